"""What a run goes on from, and what it refuses to go on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from audit_lines import read_audit
from bad_packs import poison
from fleet import lines, losses, train
from small_corpus import make_corpus

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text, read_manifest
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.objectives.base import StepInputs, Term
from megatron_lcl.objectives.built_in import Clip
from megatron_lcl.objectives.contrast import Contrast
from megatron_lcl.objectives.generation import Generation
from megatron_lcl.train.checkpoint import folder as checkpoint


@pytest.mark.slow
def test_from_a_named_checkpoint_into_a_new_folder(
    config_file: str, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    train(first, "--config", config_file)
    named = checkpoint.list_checkpoints(first)[0]
    assert checkpoint.step_of(named) == 4
    said = train(tmp_path / "second", "--config", config_file, "--resume", str(named))
    assert f"going on from {named}" in said
    assert "changed" not in said
    assert losses(tmp_path / "second") == undisturbed[4:]
    # at another layout, too, nothing is written there, where it may not be allowed
    before = sorted(named.rglob("*"))
    half = ("--checkpoint.every", "3", "--train.steps", "7", "--zero.stage", "2")
    said = train(tmp_path / "converted", "--config", config_file, *half, "--resume", str(named))
    assert f"converted {named} from " in said
    assert sorted(named.rglob("*")) == before
    left = list((tmp_path / "converted" / "checkpoints").iterdir())
    assert {path.name for path in left} == {"step-00000006", "step-00000007"}
    said = train(tmp_path / "third", "--config", config_file, "--resume", str(tmp_path / "nothing"), code=2)
    assert "nothing" in said
    said = train(tmp_path / "third", "--config", config_file, "--resume", str(first), code=2)
    assert f"checkpoint.resume = {first} is at step 12, and has all steps of train.steps = 12; raise that" in said
    fields = {"language.layers": 1, "language.mlp_width": 32, "vision.layers": 1, "vision.mlp_width": 32}
    other = [word for name, value in fields.items() for word in (f"--model.{name}", str(2 * value))]
    said = train(tmp_path / "third", "--config", config_file, *other, "--resume", str(named), code=2)
    assert "(" + ", ".join(f"model.{name} {value} → {2 * value}" for name, value in fields.items()) + ")" in said


@pytest.mark.slow
def test_metrics_outlive_checkpoints_that_are_gone(config_file: str, tmp_path: Path) -> None:
    """A link to storage that is not mounted is refused. Without the folder the run begins anew; the lines of before,
    and what evaluations have left, keep the place to which they are moved."""
    run, words = tmp_path / "run", ["--config", config_file, "--train.steps", "5"]
    train(run, *words)
    before, trained = (run / "metrics.jsonl").read_text(), losses(run)
    evaluated = [run / f"{name}.json" for name in ("heldout_examples", "heldout", "labeled")]
    for file in evaluated:
        file.write_text(result := json.dumps({"step": 5}))
    shutil.move(run / "checkpoints", tmp_path / "unmounted")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    said = train(run, *words, code=2)
    assert f"{run / 'checkpoints'} is a link to {tmp_path / 'scratch'}, which is not there" in said
    assert (run / "metrics.jsonl").read_text() == before
    (run / "checkpoints").unlink()
    said = train(run, *words)
    (aside,) = run.glob("metrics-*.jsonl")
    assert f"metrics.jsonl tells of a checkpoint of step 5, and {run / 'checkpoints'} has none: " in said
    kept = [aside.with_name(aside.name.replace("metrics", file.stem)).with_suffix(".json") for file in evaluated]
    assert f"its lines are now in {aside}, results of evaluations in {', '.join(file.name for file in kept)}\n" in said
    assert aside.read_text() == before
    assert [file.read_text() for file in kept] == 3 * [result]
    assert not any(file.exists() for file in evaluated)
    assert losses(run) == trained
    shutil.rmtree(run / "checkpoints")
    (tmp_path / "unmounted").rename(run / "checkpoints")
    aside.replace(run / "metrics.jsonl")
    for file, back in zip(kept, evaluated, strict=True):
        file.replace(back)
    assert "its lines are now" not in train(run, *words)
    assert (run / "metrics.jsonl").read_text().startswith(before)
    assert all(file.exists() for file in evaluated)


@pytest.mark.slow
def test_a_changed_corpus_is_refused_unless_allowed(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpus that the run has read is rewritten at its place, and another one is added.

    On the way a run that was at its end is made longer, which is said, with the jump of its learning rate.
    """
    mine = tmp_path / "corpus"
    shutil.copytree(Path(config_file).parent / "documents" / "corpus", mine)
    run, words = tmp_path / "run", ["--config", config_file, "--data.corpora", str(mine)]
    train(run, *words, "--train.steps", "4")
    before = losses(run)
    added = make_corpus(tmp_path / "other", seed=1, tokenizer=mine)
    both = ["--config", config_file, "--data.corpora", f"[{{path: {mine}}}, {{path: {added}}}]"]
    said = train(run, *both, code=2)
    assert f"nothing is missing, {added} is new" in said
    assert "--data.allow-change" in said
    shutil.move(added, tmp_path / "added")
    shutil.move(mine, added)
    shutil.move(tmp_path / "added", mine)  # now they have changed places
    said = train(run, *words, code=2)
    assert f"{mine} is missing, {mine} is new or has changed" in said
    assert losses(run) == before
    weights = ["--data.corpora", f"[{{path: {added}, weight: 2}}]"]  # all the same of one corpus
    longer = ["--config", config_file, *weights, "--train.steps", "6"]
    assert main(["train", "--dry-run", "--processes", "2", "--train.output", str(run), *longer]) == 0
    planned = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("   ")]
    said = train(run, *longer).splitlines()
    assert losses(run)[:4] == before
    started = next(n for n, line in enumerate(said) if line.startswith(f"going on from {run}"))
    told = said[started + 1 : started + 4]
    moved = f"data.corpora.0.path {mine} → {added}, data.corpora.0.weight 1.0 → 2.0"
    assert told[:2] == [
        "setting changed: train.steps 4 → 6",
        f"changed without effect on what is trained: {moved}",
    ]
    rates = [line["lr"] for line in lines(run) if "loss" in line][3:5]
    jump = f"from {rates[0]:.2g} in step 4, the last one, to {rates[1]:.2g} in step 5, the next one"
    assert told[2].startswith(f"warning: the learning rate jumps {jump} (train.steps 4 → 6)")
    assert told == planned, "a dry run has said the same"
    (event,) = [event for event in read_audit(run) if event["event"] == "changed"]
    assert list(event["settings"].values()) == [[str(mine), str(added)], [1.0, 2.0], [4, 6]]
    assert told[2:] == [f"warning: {warning}" for warning in event["warnings"]]
    train(run, *both, "--data.allow-change")
    assert losses(run)[:4] == before
    assert len(losses(run)) == 12
    ledger = checkpoint.read_progress(checkpoint.list_checkpoints(run)[-1]).ledger
    assert [len(entry["blend"]) for entry in ledger["entries"]] == [1, 2]
    (event,) = [event for event in read_audit(run) if event["event"] == "blend changed"]
    assert (event["gone"], [path for path, _ in event["new"]]) == ([], [str(mine)])
    config = (run / "config.yaml").read_text()
    for folder in (run, checkpoint.list_checkpoints(run)[-1]):  # it was given for that start alone
        assert not configs.load(folder / "config.yaml").data.allow_change
    events = [event["event"] for event in read_audit(run)]
    train(run, *both, "--data.allow-change", "--train.steps", "14")  # as a job that is queued again
    assert "data.allow_change" not in str([event.get("settings") for event in read_audit(run)[len(events) :]])
    config = (run / "config.yaml").read_text()
    shutil.rmtree(mine)
    shutil.rmtree(added)
    other = make_corpus(tmp_path / "third", seed=2, tokenizer=Path(config_file).parent / "documents" / "corpus")
    words = ["--config", config_file, "--data.corpora", str(other), "--data.allow-change", "--train.steps", "16"]
    said = train(run, *words, code=2)
    assert f"this run is in a window of documents of {mine} " in said
    assert (run / "config.yaml").read_text() == config


def weight_the_loss(_rank: int) -> None:
    """`clip` as it was in an earlier version."""

    def terms(self: Clip, step: StepInputs) -> list[Term]:
        return [Contrast(step, self.config.objective.contrastive_weight), Generation(step, 0.0)]

    Clip.terms = terms  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_clip_run_of_an_earlier_version_goes_on_as_it_was(config_file: str, tmp_path: Path) -> None:
    """Whose loss counted a tenth. With the clipping and epsilon of the warning it does what that version did."""
    run = tmp_path / "run"
    words = ["--config", config_file, "--train.steps", "8", "--objective.name", "clip", "--optimizer.clip_norm", "0.05"]
    words += ["--objective.contrastive_weight", "0.1"]
    train(run, *words, size=1, plant=weight_the_loss)
    formerly = {line["step"]: line for line in lines(run) if "loss" in line}
    assert formerly[8]["loss"] == pytest.approx(0.1 * formerly[8]["contrastive"])
    old, newest = checkpoint.list_checkpoints(run)
    checkpoint.delete(newest)
    progress = json.loads((old / "progress.json").read_text())
    progress["layout"]["cuts"] = progress["layout"].pop("partition")
    (old / "progress.json").write_text(json.dumps(progress))
    files = {**read_manifest(old), "progress.json": fingerprint(old / "progress.json")}
    (old / MANIFEST).write_text(manifest_text(files))
    heeded = ["--optimizer.clip_norm", "0.5", "--optimizer.eps", "1e-5"]
    said = train(run, *words, *heeded, size=1)
    assert "warning" not in said
    for line in lines(run):
        if line["step"] > 4 and "loss" in line:
            before = formerly[line["step"]]
            assert line["loss"] == line["contrastive"] == pytest.approx(before["contrastive"], rel=1e-4)
            assert line["grad_norm"] == pytest.approx(10 * before["grad_norm"], rel=1e-3)
            assert line["log_scale"] == pytest.approx(before["log_scale"], rel=1e-6)


@pytest.mark.slow
def test_losses_that_count_otherwise_are_no_spikes(config_file: str, tmp_path: Path) -> None:
    """From step 8 on a loss of ten times the weight; steps 9 and 10 are bad, and the run goes back to step 8."""
    run, same = tmp_path / "run", tmp_path / "same"
    words = ["--config", config_file, "--guard.spike_sigmas", "6", "--guard.spike_window", "8"]
    words += ["--guard.max_bad_steps", "2"]
    train(run, *words)
    *_, eight, last = checkpoint.list_checkpoints(run)
    kept = checkpoint.read_progress(last).guard
    assert len(kept["losses"]) == 8
    train(same, *words, "--resume", str(eight))
    assert checkpoint.read_progress(checkpoint.list_checkpoints(same)[-1]).guard == kept
    checkpoint.delete(last)
    train(run, *words, "--objective.generation_weight", "10", plant=poison, planted=([33, 38], "nan"))
    events = [(line["event"], line["step"]) for line in read_audit(run)]
    assert events == [("changed", 8), ("step skipped", 9), ("step skipped", 10), ("rewind", 10)]
    losses_since = checkpoint.read_progress(checkpoint.list_checkpoints(run)[-1]).guard["losses"]
    assert len(losses_since) == 4
    assert min(losses_since) > 5 * max(kept["losses"])


@pytest.mark.slow
def test_a_rewind_to_before_the_batch_was_changed(config_file: str, tmp_path: Path) -> None:
    """Step 7 is bad, and so is step 8, the first of the larger batch: back to step 4, and on with that batch."""
    run, words = tmp_path / "run", ["--config", config_file, "--guard.max_bad_steps", "2"]
    train(run, *words, "--train.steps", "7", plant=poison, planted=([26], "nan"))
    train(run, *words, "--train.global_batch", "8", plant=poison, planted=([26, 31], "nan"))
    events = [(line["event"], line["step"]) for line in read_audit(run)]
    assert events == [("step skipped", 7), ("changed", 7), ("step skipped", 8), ("rewind", 8)]
    assert len(losses(run)) == 12
    progress = checkpoint.read_progress(checkpoint.list_checkpoints(run)[-1])
    assert (progress.step, progress.packs) == (12, 16 + 8 * 8)
    config, ledger = configs.load(run / "config.yaml"), Ledger.from_json(progress.ledger)
    read = [ledger.reading_at(step, config) for step in (3, 4, 11)]
    assert [(reading.global_batch, packs) for reading, packs in read] == [(4, 12), (8, 16), (8, 72)]


@pytest.mark.slow
def test_a_warmup_that_does_not_end_is_said_while_there_are_steps(config_file: str, tmp_path: Path) -> None:
    run, words = tmp_path / "run", ["--config", config_file, "--optimizer.warmup", "4", "--train.steps"]
    said = train(run, *words, "2", size=1)
    assert "warning: optimizer.warmup = 4 is not over before the end, train.steps = 2: " in said
    assert "optimizer.warmup" not in train(run, *words, "2", size=1), "it has ended"
    assert "is not over" not in train(run, *words, "6", size=1)
