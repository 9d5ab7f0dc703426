"""Rules that ask an encoder: which text an image belongs to, how a linear head scores it, which images it finds alike.

Imports config, convert, curate, data and evaluate.encoders. Begin with `matching.py` for the first, `features.py` for
the others.
"""
