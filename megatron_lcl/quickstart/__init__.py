"""The command `quickstart`: from pages of HTML, and emoji, to an exported encoder and a report.

It puts the other packages' functions in a row, may import everything but `selftest` and `cli`, and nothing else imports
it. Begin with `run.quickstart`; `blend.yaml` is the config that it trains, `manual.yaml` the one without the emoji.
"""
