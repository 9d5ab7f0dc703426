"""Data: from a source's files to the batches that a step reads. Seven rooms:

storage/    object storage, as the inputs and outputs of all others
corpus/     a corpus as it lies on disk: documents, shards, the manifest, tokenizers
engines/    work divided into jobs: processes, Slurm, Ray
prepare/    into a corpus: importers, preprocess, merge, verify
fetch/      images from the web into a store that importers read
loading/    out of a corpus: sequences, packs, the pack index, batches
pages/      HTML pages of a corpus and of a step's batch

They import each other one way: storage ← corpus ← prepare ← fetch, and corpus ← loading ← pages; prepare and fetch
use the engines. Prepare and loading do not import each other.

Imports config; no objective, no model, and never torch.distributed (ranks and world sizes are arguments). Begin with
`corpus/document.py`.
"""
