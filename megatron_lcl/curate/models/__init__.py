"""Rules that ask an encoder: which text each image of a document belongs to. Begin with `matching.py`."""
