"""Pipeline parallelism: the model's layers in stages, one on each process of a pipeline.

partition.py decides which layers go into which stage, schedule.py in which order a stage computes, engine.py is
DeepSpeed's engine with that order, and its stepper. Begin with schedule.py. May import the model, objectives, and of
train the step, precision and master weights, never the run or train/engine.py, which imports this package.
"""
