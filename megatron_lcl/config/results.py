"""Which fields of the config change what a run comes to."""

from __future__ import annotations

import re

NO_MATTER = re.compile(
    r"train\.(output|progress|log_every)|data\.(workers|look_ahead|cache|cache_gb|storage_cache_gb)"
    r"|checkpoint\..*|guard\.(?!spike_).*"
)
"""dotted names of those that do not; docs/report.md lists them"""
