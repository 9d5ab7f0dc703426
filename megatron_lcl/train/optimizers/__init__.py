"""Optimizers that know the tensors in DeepSpeed's flat partitions.

DeepSpeed flattens the parameters of a group, and a process holds, and steps, a run of the result: pieces of tensors,
which with tensor parallelism are themselves shards. `pieces` says which; `tensorwise` steps them, each tensor at its
own rate and by its own rule; `muon` brings matrices together.

Of train it imports uncompiled. Begin with `pieces.py`, then `tensorwise.py`.
"""
