"""What a run would take, before it starts: memory, time and network of every layout, on a machine without GPUs.

devices.py has what vendors publish of their GPUs, calibrate.py measures the CPU at hand; work.py counts what a layer
computes, network.py what a process sends, predict.py makes seconds of both. layouts.py ranks the layouts that fit.

Imports config, data, losses, model, objectives, parallel and train. Begin with run.py.
"""
