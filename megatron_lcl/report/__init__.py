"""One HTML page about a run folder: losses, held-out retrieval, the first batch, what the corpora dropped.

It reads what other packages wrote (the run's config, metrics and checkpoints, the held-out evaluation, the corpora) and
may import all of them but `quickstart`, `selftest` and `cli`. Begin with `page.write_report`; `report.html` is its
template.
"""
