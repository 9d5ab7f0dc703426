"""The command `demo`: data sets to learn from, made of packages that anybody can fetch: `emoji`, `things`, `manual`.

`packages.py` gets the packages with the user's own clients and checks them. `emoji.py` and `things.py` turn theirs into
pictures with names (`pictures.py`), which `split.py` divides, `documents.py` arranges into documents and `write.py`
writes: documents in the generic format, corpora, and labeled pictures for `evaluate`. `manual.py` is the GIMP manual.
`train.py` trains on them (`--train`; `train.yaml`).

May import everything but claim, cli, quickstart and selftest. Begin with `run.demo`.
"""
