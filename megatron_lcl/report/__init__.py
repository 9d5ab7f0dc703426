"""HTML pages about run folders: pictures and the names that they were given, curves, what happened, held-out retrieval,
the first batch, what the corpora dropped; of one run, or of several side by side.

It reads what other packages wrote: the run's config, metrics and checkpoints, the evaluations, the corpora. May import
everything but claim, cli, curate, demo, quickstart and selftest. Begin with `page.RunPage` or `runs.RunsPage`: `series`
reads the numbers as a stream, `files` what is one JSON file, `curves` says which charts there are, `charts` draws them,
`serve` is `report --watch`. `report.html` and `runs.html` are the templates, with `gallery.html` (the pictures),
`style.html` and `script.html`; `live.html` is of `report --watch` alone.
"""
