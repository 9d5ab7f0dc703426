"""Which fields of the config change nothing of what a run comes to."""

from __future__ import annotations

START = ("train.output", "train.progress", "checkpoint.resume", "data.allow_change")
"""dotted names of those that say where and how a run is started, not what it does"""
NO_RESULT = (
    *(*START, "checkpoint.", "train.log_every", "train.trackers", "train.peak_flops", "train.profile"),
    *("data.workers", "data.look_ahead", "data.cache", "data.storage_cache_gb"),
    *("data.max_bad_images", "data.max_bad_fraction"),
    *("guard.timeout", "guard.long_timeout", "guard.every", "guard.max_rewinds"),
)
"""beginnings of the dotted names of those that change no result, these among them; docs/report.md lists them"""
ROUNDING = (
    *("parallel.", "zero.", "contrast.strategy", "train.deterministic", "train.activation_checkpointing"),
    *("train.measure_kernels", "train.attention", "train.compile"),
)
"""likewise of those that change results by rounding alone, as does every `micro_batch`; docs/faults.md lists them"""
