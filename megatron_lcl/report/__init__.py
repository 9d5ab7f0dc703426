"""One HTML page about a run folder: pictures and the names that they were given, losses, held-out retrieval, the first
batch, what the corpora dropped.

It reads what other packages wrote (the run's config, metrics and checkpoints, the evaluations, the corpora) and may
import all of them but `quickstart`, `selftest` and `cli`. Begin with `page.write_report`; `report.html` is its
template, `gallery.html` the part with the pictures.
"""
