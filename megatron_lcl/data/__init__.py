"""Data: from a source's files to the batches that a step reads. Five rooms:

corpus/     a corpus as it lies on disk: documents, shards, the manifest, tokenizers
prepare/    into a corpus: importers, preprocess, merge, verify
fetch/      images from the web into a store that importers read
loading/    out of a corpus: sequences, packs, the pack index, batches
pages/      HTML pages of a corpus and of a step's batch

Imports point one way: corpus ← prepare ← fetch, and corpus ← loading ← pages; prepare and loading do not import each
other. Of the rest of the package data imports `config`, `errors`, `fields` and `plugins` only: no objective, no model,
and never torch.distributed (ranks and world sizes are arguments). Begin with `corpus/document.py`.
"""
