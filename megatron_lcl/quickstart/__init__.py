"""The command `quickstart`: from pages of HTML, and emoji, to an exported encoder and a report.

It puts the other packages' functions in a row, and only the command imports it. May import everything but cli and
selftest. Begin with `run.quickstart`; `blend.yaml` is the config that it trains, `manual.yaml` the one without the
emoji.
"""
