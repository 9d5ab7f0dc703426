"""From source files to a corpus: `preprocess`, and what is done with finished corpora (`merge`, `verify`, `retokenize`,
`export_corpus`).

`preprocess.py` cuts the input into tasks; `preprocess_task.py` writes a task's documents as parts, in any process;
`finish.py` makes a corpus of all parts. `unfinished.py` has the folder of a corpus that is not complete, from its first
file to the last; `data/corpus/scratch.py` lets several processes work in it, `jobs.py` has an engine (`data/engines`)
run the work in jobs. `budget.py` stops where too much of the input is bad, `sorting.py` sorts hashes beyond memory,
`holdout.py` chooses held-out documents. `importers/` has a file for each source format; `first_documents.py` reads one
no further than `--limit`, `faulty_documents.py` tells what one of another package yields that is no document.

Imports data.corpus, data.engines and data.storage. Begin with the header of `preprocess.py`.
"""
