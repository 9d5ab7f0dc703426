"""What keeps a run going, or ends it in order with a message and an exit code that launch scripts understand.

Begin with docs/faults.md, then `watchdog.py` (processes that die or hang), `bad_steps.py` (losses that are not finite,
spikes), `replicas.py` (parameters that differ), `signals.py` (requested ends), `faults.py` (exit codes), `lock.py` (one
run a folder), `audit.py` (audit.jsonl).

Of train it imports launch and launch_store. It knows neither engine nor checkpoints: `run.py` connects them.
"""
