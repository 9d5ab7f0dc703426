"""The command `quickstart`: from pages of HTML to an exported encoder and a report, by the other packages' functions.

It may import everything but `selftest` and `cli`; nothing else imports it. Begin with `run.quickstart`;
`quickstart.yaml` is the config that it trains.
"""
