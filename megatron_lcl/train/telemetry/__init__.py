"""What a run measures of itself, and where that is written. docs/metrics.md names every metric.

Taken in the step: clock.py (phases), norms.py (by part), features.py (a sample of latents and contexts). Made of it:
health.py (collapse), stragglers.py (the slowest process); devices.py has the peaks for MFU. log.py puts it together:
console, and the sinks (sinks.py): metrics.jsonl (lines.py), TensorBoard, trackers (by feed.py). bad_image_log.py
collects what it says of images that did not decode. meter.py stands between a run's loop and all of it, and counts
throughput and FLOP/s; profile.py is `train --profile`.

Of train it imports optimizers.pieces, parts, precision, resilience.faults, resilience.signals, result and settings; not
the step or the run. Begin with meter.py, then log.py.
"""

from megatron_lcl.train.telemetry.lines import read_metrics
from megatron_lcl.train.telemetry.log import Telemetry

__all__ = ["Telemetry", "read_metrics"]
