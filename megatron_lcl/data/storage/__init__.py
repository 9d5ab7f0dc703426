"""Object storage: `s3://bucket/folder` and `http(s)://host/folder` (`gs://`, `az://` as far as obstore goes).

`store.py` is what the rest of the package uses: whole objects, ranges of them, files to and from a folder. Requests are
made by a process of their own (`server.py`), because obstore's threads do not survive a fork, and training forks its
loader processes. `blocks.py` keeps ranges of one object on the local disk. `paths.py` has objects as the files of an
input. `names.py` tells which names of a manifest may be written. `faults.py` says errors in one line.

Imports no other package. Begin with `store.py`.
"""
