"""The command `claim`: the paper's comparison at the size of a laptop, from scratch and with seeds.

`parts.py` declares what is compared. `data.py` makes corpora of one tokenizer, and labeled pictures, from the sets of
`demo`; `plan.py` turns a row of a part into runs that see the same number of images; `train.sweep` runs them;
`measure.py` evaluates each, and the learning rates on a validation split; `table.py` gives means and intervals.

May import everything but cli, quickstart and selftest. Begin with `run.claim`.
"""
