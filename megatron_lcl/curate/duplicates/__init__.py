"""What a corpus has twice, or has of another corpus or of evaluation images.

Each rule is a function that describes the documents of one task (`document_facts`, `image_facts`,
`contamination_facts`: corpus and range of documents → arrays, which the caller saves as one .npz), and a join of these
files, given in the corpus's order, to `Removals` (`join_documents`, `join_images`, `join_evaluation`). The joins do not
depend on how the corpus was cut into tasks.

Imports config, curate.documents, curate.joins, data and evaluate. Begin with `facts.py`, then `join.py`; evaluation
images are in `evaluation.py`.
"""
