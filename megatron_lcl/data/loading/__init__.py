"""Out of a corpus, to batches: documents → sequences → packs → PackedBatch.

rules.py says what is read, as a plain record, `Sequences`; sequence.py places and cuts a document (compiled); source.py
is a corpus with the size of each document; packing.py fills packs and pack_index.py says which document goes into
which, with the ledger of a run, of what its phases read (reading.py); sequential_index.py does of an evaluation;
cache.py keeps both on disk; images.py and, for training, crops.py decode; reader.py assembles batches (batch.py),
loader.py has them made.

Imports config, data.corpus and data.storage. Never torch.distributed. Begin with reader.PackReader.
"""
