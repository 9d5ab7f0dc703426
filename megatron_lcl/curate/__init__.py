"""Corpus to corpus: what rules do not want is removed, counted, named, and kept as samples to look at.

Every pass only decides; then what is left is copied. `judge` (pass 1, in parallel) applies the rules of single texts
and images and collects what the rules over the whole corpus need; these (`joins`) decide next; `decide` (pass 2, in
parallel) takes away what they said and applies the rules of whole documents to what is left; `write` (in parallel)
copies it: token ids and encoded images as they are. `settings` are the thresholds, `presets/` those of the papers,
`measures` what they are compared with, `result` is what was removed, `page` shows it.

Imports config, convert, data and evaluate. Begin with `run.py`.
"""
