"""Checkpoints: saved in the background, complete or absent, loadable at every layout.

Begin with `folder.py`: what is in a checkpoint, which one is resumed, what is deleted. `checkpointer.py` writes and
loads, with `snapshot.py` (what DeepSpeed would write), `state.py` (reads what DeepSpeed wrote) and `reshard.py` (to
another layout); `saver.py` counts saves that fail. `unpickle.py` keeps pickles from running code, `inventory.py` is the
command, `initial_weights.py` reads `train.init_from`.

Of train it imports averages, master_weights, optimizer, optimizers, parts, precision, resilience.audit,
resilience.faults and telemetry; the engine is handed to it.
"""
