"""Data as HTML pages and text, for people: `inspect.py` of a corpus, `replay.py` of the batch of a step.

Imports config, data.corpus and data.loading. Needs no GPU and no process group. Begin with `inspect.py`.
"""
