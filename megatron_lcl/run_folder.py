"""Names in a run folder that more than one package reads or writes. Imports nothing, so that listing one stays fast.

RUN/
    .lock                       there since before the config; see train/resilience/lock.py
    config.yaml                 the run's config
    metrics.jsonl               see train/telemetry/lines.py
    metrics-DATE-TIME.jsonl     the same, set aside because checkpoints were gone; with it the results of evaluations
    plan.json                   of `plan --json`, where somebody puts it there; `report` shows it instead of its own
    profile/                    of `train --profile`; see train/telemetry/profile.py
    heldout.json                what the latest held-out evaluation measured; see evaluate/heldout_results.py
    heldout_examples.json       of the same, some pairs with the contexts found nearest
    labeled.json                what the latest evaluation on labeled images measured; see evaluate/labeled.py
    results.json                of `evaluate --output`, here or in a folder below; see evaluate/results.py
    gallery.json                of the same, pictures for the report; see evaluate/gallery.py
    audit.jsonl                 see train/resilience/audit.py
    checkpoints/step-00001000/  config.yaml, model.safetensors, progress.json …; see train/checkpoint/folder.py
"""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
PLAN = "plan.json"
PROFILE = "profile"
HELDOUT = "heldout.json"
EXAMPLES = "heldout_examples.json"
LABELED = "labeled.json"
RESULTS = "results.json"
GALLERY = "gallery.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
WEIGHTS = "model.safetensors"
"""all parameters of a checkpoint, or of an import"""
PROGRESS = "progress.json"
"""where the run stood that wrote a checkpoint"""
AVERAGES = "averages"
"""folder of a checkpoint with a folder for each average of the weights: model.safetensors and config.yaml"""
