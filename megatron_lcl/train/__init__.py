"""Training: everything between a config and a run's checkpoints. Only this package imports DeepSpeed.

Begin with `run.py` and `loop.py`, which read top to bottom as the run: `checks.py` before it, `resume_point.py` where
it begins, `engine.py` what is built, `step.py` what a step computes. `checkpoint/` is what is saved and loaded,
`resilience/` what keeps a run going or ends it in order, `pipeline/` stages on several processes. `layout.py`,
`settings.py` and `memory.py` say what fits together; `launch.py` starts processes; `dryrun.py` prints what a run would
do.

May import everything but claim, cli, curate, demo, plan, quickstart, report and selftest.
"""
