"""Does every layout give here what one process gives? Steps of a tiny model against plain torch, and bytes sent.

cases.py has the layouts and batches, reference.py the same steps without any parallelism, worker.py runs one process of
a case, count_traffic.py counts what it sends (what it must is in train/traffic.py); kernels.py compares attention
and loss kernels with the plain formula.

May import everything but cli and quickstart. Begin with run.py.
"""
