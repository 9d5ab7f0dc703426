"""Pipeline parallelism: the model's layers in stages, one on each process of a pipeline.

partition.py decides which layers go into which stage, schedule.py in which order a stage computes, engine.py is
DeepSpeed's engine with that order, and its stepper.

Of train it imports master_weights, parts, precision, step and telemetry.clock; not the run or train/engine.py, which
imports this package. Begin with schedule.py.
"""
