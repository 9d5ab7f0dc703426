"""A corpus on disk (docs/corpus-format.md): what is written once, memory-mapped, and never changed.

`document.py` says what a document is, `store.py` how a shard of them is written and read, `corpus_manifest.py` is the
manifest, `indexed.py` is Megatron-Core's container, byte for byte. `tokenizer.py` makes token ids of texts, `probe.py`
decides which images are usable, `drops.py` counts what was dropped, `kinds.py` says how a shard's images stand to its
texts. `files.py` (hashes, durable writes) and `owners.py` (what processes left that were killed) serve checkpoints and
exports, too, `cache_folders.py` all that is cached, `upload.py` all outputs in object storage.

Imports data.storage. Begin with `document.py`, then `store.py`.
"""
