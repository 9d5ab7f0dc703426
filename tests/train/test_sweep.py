"""`train --sweep`: which runs it makes, what it refuses, what one that fails does to the others; and their report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from small_corpus import make_corpus

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.cli.arguments import overrides_of
from megatron_lcl.config import Config
from megatron_lcl.convert.manifest import fingerprint, manifest_text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.errors import UserError
from megatron_lcl.report.runs import Run, find_runs, group, write_runs_report
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train import sweep
from megatron_lcl.train.checkpoint.folder import Progress, progress_text, step_folder
from megatron_lcl.train.checkpoint.mirror import Mirror
from megatron_lcl.train.finished import is_finished
from megatron_lcl.train.sweep import Member

TINY = """
model:
  vision: {{image_size: 16, patch_size: 8, width: 32, layers: 1, heads: 2, mlp_width: 64}}
  language: {{context_length: 64, vocab_size: {vocab_size}, width: 32, layers: 1, heads: 2, mlp_width: 64}}
  pool_heads: 2
data: {{corpora: {corpus}, cache: {cache}, tokens_per_pack: 96, images_per_pack: 4, workers: 0}}
train: {{steps: 2, global_batch: 4, log_every: 1, progress: false, dtype: float32}}
checkpoint: {{every: 0}}
"""


def names(*sweeps: str, **overrides: str) -> list[str]:
    return [
        member.name for member in sweep.members(None, {k.replace("__", "."): v for k, v in overrides.items()}, sweeps)
    ]


def test_members_are_the_product_and_say_their_values() -> None:
    found = sweep.members(
        None, {"train.output": "runs/x"}, ["objective.contrastive-weight=0.03,1e-1", "--train.seed=0,1"]
    )
    assert [member.name for member in found] == [
        "contrastive_weight=0.03,seed=0",
        "contrastive_weight=0.03,seed=1",
        "contrastive_weight=0.1,seed=0",
        "contrastive_weight=0.1,seed=1",
    ]
    weights = [(m.config.objective.contrastive_weight, m.config.train.seed, m.config.train.output) for m in found]
    assert weights[2] == (0.1, 0, "runs/x/contrastive_weight=0.1,seed=0")
    assert configs.load(None, overrides_of(found[2].arguments())) == found[2].config, "its arguments make the same run"
    assert names("objective.name=lcl,coca") == ["objective=lcl", "objective=coca"]
    assert names("data.seed=1", "train.seed=1,2") == ["data.seed=1,train.seed=1", "data.seed=1,train.seed=2"]
    assert names("optimizer.betas=[0.9,0.95],[0.9,0.98]") == ["betas=[0.9,0.95]", "betas=[0.9,0.98]"]
    assert names("train.init_from=null,runs/a b") == ["init_from=null", "init_from=runs_a_b"]
    assert names("""train.init_from="a,b",'c'""") == ["init_from=a,b", "init_from=c"]
    long = names("train.init_from=" + "a" * 300 + "," + "a" * 299 + "b")
    assert len(set(long)) == 2
    in_bytes = names("train.init_from=" + "数" * 120 + "," + "数" * 119 + "据")
    assert len({*in_bytes}) == 2
    assert max(len(os.fsencode(name)) for name in long + in_bytes) <= sweep.MAX_NAME


@pytest.mark.parametrize(
    ("sweeps", "said"),
    [
        (["objective.contrastive_wieght=1"], r"no config key `objective\.contrastive_wieght`; the nearest is"),
        (["optimizer.lr=1e-3,fast"], r"config key `optimizer\.lr` = 'fast': input should be a valid number"),
        (["optimizer.lr=1e-3,0.001"], r"two runs of the sweep would be lr=0\.001"),
        (["optimizer.lr"], r"--sweep optimizer\.lr: give a field and its values"),
        (["optimizer.lr=1e-3,"], r"give a field and its values"),
        (["train.output=a,b"], r"a sweep names its run folders itself"),
        (["train.seed=1", "train.seed=2"], r"train\.seed is given twice"),
        (["train.steps=3,4"], r"train\.steps is given twice"),
        (["train.init_from=null,s3://user:word@bucket/run"], r"^s3://bucket/run: a URL with a user, a password"),
    ],
)
def test_what_is_wrong_is_said_as_of_a_single_run(sweeps: Sequence[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        names(*sweeps, train__steps="5")


def test_a_task_of_a_job_array_is_one_member() -> None:
    runs = sweep.members(None, {}, ["train.seed=5,6,7"])
    assert sweep.of_array(runs, {}) is None
    chosen = sweep.of_array(runs, {"SLURM_ARRAY_TASK_ID": "1", "RANK": "0"})
    assert chosen is not None
    assert chosen.config.train.seed == 6
    for wrong in ("3", "-1", "x"):
        with pytest.raises(UserError, match=r"3 runs; submit it with --array=0-2"):
            sweep.of_array(runs, {"SLURM_ARRAY_TASK_ID": wrong})
    with pytest.raises(UserError, match="submit it as a job array"):
        sweep.of_array(runs, {"RANK": "0"})


def test_each_member_has_its_own_copies() -> None:
    """From those of another a new member would go on, and be finished at once."""
    runs = sweep.members(None, {"checkpoint.mirror": "s3://b/run/"}, ["train.seed=5,6"])
    assert [run.config.checkpoint.mirror for run in runs] == ["s3://b/run/seed=5", "s3://b/run/seed=6"]
    assert "--checkpoint.mirror=s3://b/run/seed=6" in runs[1].arguments()
    runs = sweep.members(None, {}, ["checkpoint.mirror=s3://b/one,s3://b/two"])
    assert [run.config.checkpoint.mirror for run in runs] == ["s3://b/one", "s3://b/two"]


def write_finished(config: Config, step: int | None = None) -> None:
    """What is read of a run that has made its steps, or so many of them."""
    run, step = Path(config.train.output), step or config.train.steps
    folder = step_folder(run, step)
    folder.mkdir(parents=True, exist_ok=True)
    for place in (run, folder):
        (place / CONFIG).write_text(configs.to_yaml(config))
    (folder / "progress.json").write_text(progress_text(Progress(step, 0, {})))
    (folder / "manifest.json").write_text(
        manifest_text({n: fingerprint(folder / n) for n in (CONFIG, "progress.json")})
    )


def test_an_array_task_of_a_finished_run_leaves_it_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one with other settings is an error, also when the run folder's config says these: it was started with them
    since."""
    run, made = tmp_path / "seed=6", configs.load(None, {"train.output": str(tmp_path / "seed=6"), "train.seed": "6"})
    write_finished(made)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    words = ["train", "--sweep", "train.seed=5,6", "--train.output", str(tmp_path)]
    (run / CONFIG).write_text(configs.to_yaml(configs.replace(made, optimizer__lr=0.5)))
    assert main(words) == 0
    assert capsys.readouterr().out == "seed=6 was finished before\n"
    assert main([*words, "--optimizer.lr", "0.5"]) == 2
    assert "has made 1000 of 1000 steps with optimizer.lr = " in capsys.readouterr().err


def test_the_command_of_an_array_task_is_that_of_its_member(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert main(["train", "--sweep", "train.seed=5,6", "--train.output", "runs/x", "--print-config"]) == 0
    config = capsys.readouterr().out
    assert "seed: 6" in config
    assert "output: runs/x/seed=6" in config


@pytest.mark.parametrize(
    ("codes", "fail_fast", "begun", "code"),
    [
        ([0, 0, 0], False, 3, 0),
        ([0, 1, 0], False, 3, 1),
        ([2, 1, 0], False, 3, 2),
        ([0, 1, 0], True, 2, 1),
        ([0, 75, 0], False, 2, 75),
        ([1, 130, 0], False, 2, 130),
        ([0, 143, 0], False, 2, 143),
        ([0, 138, 0], False, 2, 138),
    ],
)
def test_a_failure_leaves_the_others_alone(
    codes: list[int], fail_fast: bool, begun: int, code: int, tmp_path: Path
) -> None:
    runs = sweep.members(None, {"train.output": str(tmp_path)}, ["train.seed=0,1,2"])
    started: list[int] = []
    lines: list[str] = []

    def start(member: Member) -> int:
        started.append(member.config.train.seed)
        return codes[member.config.train.seed]

    assert sweep.run_members(runs, start, fail_fast, lines.append) == code
    assert started == list(range(begun))
    became = ["finished" if c == 0 else f"exit code {c}" for c in codes[:begun]] + ["not begun"] * (3 - begun)
    assert lines[-3:] == [f"seed={n}  {what}" for n, what in enumerate(became)]


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_that_a_run_at_its_end_has_no_use_for_ends_the_sweep(
    signum: int, code: int, own: int, tmp_path: Path
) -> None:
    runs = sweep.members(None, {"train.output": str(tmp_path)}, ["train.seed=0,1,2"])
    told, lines = list[int](), list[str]()

    def start(member: Member) -> int:
        told.extend([signum] * member.config.train.seed)
        return own * member.config.train.seed

    assert sweep.run_members(runs, start, False, lines.append, told) == code
    assert lines[-3:] == ["seed=0  finished", f"seed=1  {'exit code 1' if own else 'finished'}", "seed=2  not begun"]


def make_runs(folder: Path) -> Path:
    """A sweep of two seeds, made by the command, the second after the first was there."""
    corpus = make_corpus(folder / "in", seed=0)
    text = TINY.format(vocab_size=open_corpus(corpus).tokenizer.vocab_size, corpus=corpus, cache=folder / "cache")
    (folder / "config.yaml").write_text(text)
    command = ["train", "--config", str(folder / "config.yaml"), "--processes", "1"]
    command += ["--train.output", str(folder / "sweep")]
    assert main([*command, "--sweep", "train.seed=0"]) == 0
    first = (folder / "sweep" / "seed=0" / "metrics.jsonl").read_bytes()
    assert main([*command, "--sweep", "train.seed=0,1"]) == 0
    assert (folder / "sweep" / "seed=0" / "metrics.jsonl").read_bytes() == first, "it was finished"
    return folder


@pytest.fixture
def made(once: Callable[[str, Callable[[Path], Any]], Any], tmp_path: Path) -> Path:
    """A copy of a finished sweep of two seeds, with its config beside it."""
    folder = once("sweep", make_runs)
    shutil.copytree(folder / "sweep", tmp_path / "sweep")
    shutil.copy(folder / "config.yaml", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_run_is_as_if_alone_and_a_finished_one_stays(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {path.name: Run.of(path) for path in find_runs([made / "sweep"])}
    assert sorted(runs) == ["seed=0", "seed=1"]
    assert [runs[name].settings["train.seed"] for name in sorted(runs)] == [0, 1]
    assert all(run.steps == 2 for run in runs.values())
    first, second = (runs[name].metrics.series["loss"].points().mean[0] for name in sorted(runs))
    assert first != second
    command = ["train", "--config", str(made / "config.yaml"), "--sweep", "train.seed=0,1"]
    command += ["--processes", "1", "--train.output", str(made / "sweep")]
    assert main(command) == 0
    assert capsys.readouterr().err.count("was finished before") == 2
    assert main([*command, "--optimizer.lr", "0.5"]) == 2
    last = made / "sweep" / "seed=0" / "checkpoints" / "step-00000002"
    said = f"{last} has made 2 of 2 steps with optimizer.lr = 0.0005 where this command has 0.5; give the settings of"
    assert said in capsys.readouterr().err
    assert main([*command, "--train.global_batch", "5", "--processes", "2"]) == 2, "nothing of it has begun"
    assert capsys.readouterr().err.startswith("megatron-lcl train: seed=0: ")
    config = configs.load(made / "sweep" / "seed=0" / CONFIG)
    corpus, moved = Path(config.data.corpora[0].path), made / "moved"
    shutil.copytree(corpus, moved)
    for place in (f"{corpus}/", os.path.relpath(corpus), str(moved)):
        assert is_finished(configs.replace(config, data__corpora=[{"path": place}])), place
    manifest = moved / "corpus.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "contents": "0" * 32}))
    with pytest.raises(UserError, match=f"with the documents of {corpus} where this command has those now in {moved};"):
        is_finished(configs.replace(config, data__corpora=[{"path": str(moved)}], data__allow_change=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train.log_every": "3", "data.look_ahead": "5", "data.storage_cache_gb": "1", "checkpoint.every": "7"}, None),
        ({"guard.timeout": "99", "guard.every": "7", "data.workers": "0", "train.progress": "false"}, None),
        ({"train.trackers": "wandb", "train.profile": "1:2", "train.profile_ranks": "[1]"}, None),
        ({"train.peak_flops": "1e12", "data.max_bad_images": "7", "data.max_bad_fraction": "0.5"}, None),
        ({"contrast.strategy": "auto", "train.attention": "dense", "train.activation_checkpointing": "full"}, None),
        ({"train.micro_batch": "4", "parallel.tensor": "2", "parallel.pipeline": "2", "zero.stage": "2"}, None),
        ({"contrast.initial_log_scale": "1"}, r"contrast\.initial_log_scale = "),
        ({"train.steps": "999"}, r"of 1000 steps with train\.steps = 1000 where this command has 999"),
        ({"train.init_from": "runs/other"}, r"train\.init_from = null where this command has runs/other"),
        ({"guard.spike_sigmas": "6"}, r"guard\.spike_sigmas = null where this command has 6\.0"),
        ({"guard.spike_window": "64"}, r"guard\.spike_window = 128 where this command has 64"),
        ({"guard.max_bad_steps": "3"}, r"guard\.max_bad_steps = 10 where this command has 3"),
        ({"data.seed": "1"}, r"data\.seed = 0 where this command has 1"),
    ],
)
def test_a_finished_run_is_the_same_with_what_changes_no_result(
    changed: dict[str, str], said: str | None, tmp_path: Path
) -> None:
    write_finished(configs.load(None, {"train.output": str(tmp_path / "seed=0")}))
    (member,) = sweep.members(None, {"train.output": str(tmp_path), **changed}, ["train.seed=0"])
    if said is None:
        assert is_finished(member.config)
        return
    with pytest.raises(UserError, match=rf"seed=0/checkpoints/step-00001000 has made 1000 .*{said}"):
        is_finished(member.config)


def test_an_unfinished_run_is_not_given_fewer_steps(tmp_path: Path) -> None:
    """That would be another schedule."""
    config = configs.load(None, {"train.output": str(tmp_path), "checkpoint.mirror": "s3://b/run"})
    write_finished(configs.replace(config, train__steps=800), step=400)
    with pytest.raises(UserError, match=r"has made 400 of 800 steps with train.steps = 800 where .*checkpoint.mirror$"):
        is_finished(configs.replace(config, train__steps=300))


def test_where_a_finished_run_had_its_data_does_not_matter(tmp_path: Path) -> None:
    """The same folder by another name, or one that is not there any more, as on another machine; but another one."""
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    names = ("evaluate.corpus", "evaluate.labeled", "train.init_from")
    output = {"train.output": str(tmp_path / "run")}
    write_finished(configs.load(None, {**output, **{name: str(tmp_path / "data") for name in names}}))
    given = {name: os.path.relpath(tmp_path / "data") for name in names}
    assert is_finished(configs.load(None, {**output, **given}))
    for name in names:
        with pytest.raises(UserError, match=name) as refused:
            is_finished(configs.load(None, {**output, **given, name: str(tmp_path / "other")}))
        assert ("; evaluate it by `megatron-lcl evaluate " in str(refused.value)) is name.startswith("evaluate.")
    with pytest.raises(UserError, match="; evaluate it by `megatron-lcl evaluate "):
        is_finished(configs.load(None, {**output, **given, "train.evaluate_every": "100"}))
    (tmp_path / "data").rename(tmp_path / "moved")
    assert is_finished(configs.load(None, {**output, **{name: str(tmp_path / "moved") for name in names}}))
    for name in names:  # nothing that is no path has moved away
        with pytest.raises(UserError, match=name):
            is_finished(configs.load(None, {**output, **given, name: "s3://bucket/data"}))


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("evaluate.corpus", "s3://bucket/a", "s3://bucket/b"),
        ("evaluate.corpus", "s3://bucket/a", "here"),
        ("train.init_from", "timm:vit_b", "timm:vit_l"),
        ("train.init_from", "vision=timm:vit_b", "nowhere/run"),
    ],
)
def test_what_is_no_path_has_not_moved(name: str, before: str, now: str, tmp_path: Path) -> None:
    run = {"train.output": str(tmp_path / "run")}
    write_finished(configs.load(None, {**run, name: before}))
    assert is_finished(configs.load(None, {**run, name: before}))
    with pytest.raises(UserError, match=f"{name} = .*{before}.* where this command has .*{now}"):
        is_finished(configs.load(None, {**run, name: now}))


def test_a_run_without_its_last_copy_is_not_finished(place: str, tmp_path: Path) -> None:
    config = configs.load(None, {"train.output": str(tmp_path), "checkpoint.mirror": place})
    write_finished(config)
    assert not is_finished(config)
    Mirror(place).upload(step_folder(tmp_path, 1000), None)
    assert is_finished(config)
    write_finished(configs.replace(config, train__log_every=3))  # saved again, as after a rewind
    assert not is_finished(config)


def test_a_run_without_its_last_evaluation_is_not_finished(tmp_path: Path) -> None:
    wanted = {"train.evaluate_every": "400", "evaluate.corpus": "heldout", "evaluate.labeled": "pictures"}
    config = configs.load(None, {"train.output": str(tmp_path / "run"), **wanted})
    write_finished(config)
    lines = [{"step": 800, "heldout/a": 1.0, "labeled/b": 1.0}, {"step": 1000, "loss": 1.0}]
    for line in ({"step": 1000, "heldout/a": 1.0}, {"step": 1000, "labeled/b": 1.0}):
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{")
        assert not is_finished(config)
        lines.append(line)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert is_finished(config)


def write_run(folder: Path, losses: Sequence[float], step: int = 1, **settings: Any) -> Path:
    """A run folder with a loss and a contrastive loss a step."""
    folder.mkdir(parents=True)
    tree = {k.replace("__", "."): str(v) for k, v in settings.items()}
    (folder / CONFIG).write_text(configs.to_yaml(configs.load(None, {"train.output": str(folder), **tree})))
    lines = [{"step": step * n, "loss": loss, "contrastive": 0.0} for n, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_seeds_are_a_band_and_other_settings_another_line(tmp_path: Path) -> None:
    write_run(tmp_path / "s/a0", [4.0, 2.0], train__seed=0, optimizer__lr=0.1, data__workers=3)
    write_run(tmp_path / "s/a1", [8.0, 3.0, 1.0], train__seed=1, optimizer__lr=0.1)
    write_run(tmp_path / "s/b0", [5.0], train__seed=0, optimizer__lr=0.2)
    (tmp_path / "s/a0/heldout.json").write_text(json.dumps({"step": 2, "image_to_context_recall_at_10": 0.25}))
    for name, accuracies in {"a0": (0.1, 0.5), "a1": (0.2, 0.7)}.items():
        with (tmp_path / f"s/{name}/metrics.jsonl").open("a") as file:
            numbers = [{"step": n, "labeled/knn_accuracy": value} for n, value in enumerate(accuracies, 1)]
            file.writelines(json.dumps({**line, "labeled/zero_shot_accuracy": 0.25}) + "\n" for line in numbers)
    runs = [Run.of(path) for path in find_runs([tmp_path / "s"])]
    one, other = group(runs)
    assert (one.label, other.label) == ("lr 0.1", "lr 0.2")
    assert [run.folder.name for run in one.runs] == ["a0", "a1"]
    assert one.band("loss") == [(1, 6.0, 4.0, 8.0, 2), (2, 2.5, 2.0, 3.0, 2), (3, 1.0, 1.0, 1.0, 1)]
    assert one.band("contrastive") == [], "always 0: not measured"
    assert (one.cell("loss"), other.cell("loss")) == (["1.5", "(1 to 2)"], ["5"])
    assert one.cell("heldout/image_to_context_recall_at_10") == ["25\u00a0%", "(1 of 2 runs)"]
    assert one.cell("labeled/knn_accuracy") == ["60\u00a0%", "(50 to 70\u00a0%)"]
    assert other.cell("labeled/knn_accuracy") == []
    page = write_runs_report([tmp_path / "s"])
    assert page == tmp_path / "s/report.html"
    text = page.read_text()
    for said in (
        "3 runs of",
        "lr 0.1",
        '1.5 <span class="quiet">(1 to 2)</span>',
        "train.seed alone",
        "<svg",
        "2 to 3 of 1000",
        '<th class="number">k-NN accuracy</th><th class="number">zero-shot accuracy</th></tr>',
    ):
        assert said in text, said
    assert text.count("<figure") == 3
    assert not any(loads in text for loads in ("src=", "<link", "@import", "url(http")), "self-contained"


def test_a_value_of_zero_counts_where_runs_are_averaged(tmp_path: Path) -> None:
    """But not the zeros that earlier versions wrote for a contrast that the objective does not have."""
    for seed, recall in enumerate((0.0, 0.3, None)):
        run = write_run(tmp_path / f"s/{seed}", [], train__seed=seed)
        lines: list[dict[str, Any]] = [
            {"step": step, "num_pairs": 8, "contrastive": 2.0, "image_accuracy": recall} for step in (1, 2)
        ]
        if recall is None:
            lines = [{**line, "loss": 1.0, "contrastive": 0.0, "image_accuracy": 0.0} for line in lines]
        else:
            lines = [{**line, "loss": 1.0} for line in lines]
            heldout = {"heldout/image_to_context_recall_at_1": recall, "heldout/median_rank": 12_345.5 + seed}
            lines += [{"step": step, **heldout} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (one,) = group([Run.of(path) for path in find_runs([tmp_path / "s"])])
    for name in ("heldout/image_to_context_recall_at_1", "image_accuracy"):
        assert [row[1:] for row in one.band(name)] == [(0.15, 0.0, 0.3, 2)] * 2
    assert one.cell("heldout/image_to_context_recall_at_1") == ["15\u00a0%", "(0 to 30\u00a0%; 2 of 3 runs)"]
    assert one.cell("contrastive") == ["2", "(2 to 2; 2 of 3 runs)"]
    assert one.cell("heldout/median_rank") == ["12,346", "(12,346 to 12,346; 2 of 3 runs)"]
    assert '<td class="number">12,346</td>' in write_runs_report([tmp_path / "s"]).read_text()


def test_a_run_that_has_just_begun_takes_nothing_from_the_others(tmp_path: Path) -> None:
    """Its end is a gap, or a mean of fewer would look like a step of the curve."""
    for seed, count in enumerate((30, 30, 4)):
        write_run(tmp_path / f"s/{seed}", [10.0 * seed + 100 / n for n in range(1, count + 1)], train__seed=seed)
    (one,) = group([Run.of(path) for path in find_runs([tmp_path / "s"])])
    band = one.band("loss")
    assert [(step, runs) for step, *_, runs in band] == [(n, 3 if n <= 4 else 2) for n in range(1, 31)]
    assert band[3] == (4, 35.0, 25.0, 45.0, 3)
    assert band[4] == (5, 25.0, 20.0, 30.0, 2)
    assert one.ends == "2 to step 30, 1 to step 4"
    text = write_runs_report([tmp_path / "s"]).read_text()
    assert "(3 runs: 2 to step 30, 1 to step 4)</span>" in text
    assert "have not come as far as others" in text
    (line,) = re.findall(r'<path class="line k0" data-label="all" d="([^"]*)"', text)
    assert [part.count("L") + 1 for part in line.split("M")[1:]] == [4, 26], "steps of each part"
    (area,) = re.findall(r'<path class="band k0" d="([^"]*)"', text)
    assert [part.count("L") + 1 for part in area.split("M")[1:]] == [2 * 4, 2 * 26], "both edges of each part"


def test_runs_that_are_logged_at_other_steps_are_compared_at_common_ones(tmp_path: Path) -> None:
    write_run(tmp_path / "s/0", [9.0] * 12, train__seed=0)
    write_run(tmp_path / "s/1", [5.0, 3.0], step=4, train__seed=1, train__log_every=4)
    (one,) = group([Run.of(path) for path in find_runs([tmp_path / "s"])])
    both = [(4, 7.0, 5.0, 9.0, 2), (8, 6.0, 3.0, 9.0, 2)]
    assert one.band("loss") == [*both, *((step, 9.0, 9.0, 9.0, 1) for step in range(9, 13))]
    write_run(tmp_path / "t/0", [9.0] * 12, train__seed=0)
    write_run(tmp_path / "t/1", [9.0] * 12, train__seed=1)
    (one,) = group([Run.of(path) for path in find_runs([tmp_path / "t"])])
    assert one.ends == ""
    assert "have not come as far" not in write_runs_report([tmp_path / "t"]).read_text()


def test_lines_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for rate in (10, 9, 0.5):
        write_run(tmp_path / f"lr={rate}", [1.0], optimizer__lr=rate)
    assert [g.label for g in group([Run.of(p) for p in find_runs([tmp_path])])] == ["lr 0.5", "lr 9", "lr 10"]


def test_the_report_of_several_runs_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"data__corpora": "/nowhere"}
    a, b = (write_run(tmp_path / name, [2.0, 1.0], train__seed=n, **settings) for n, name in enumerate("ab"))
    assert main(["report", str(a), str(b)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    assert main(["report", str(a), str(b), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").read_text() == (tmp_path / "report.html").read_text()
    capsys.readouterr()
    for found in ([str(a)], [str(a), str(b)]):
        assert main(["report", *found, str(tmp_path / "report.html"), str(tmp_path / "x.html")]) == 0, "`report runs/*`"
        assert capsys.readouterr().out == f"{(a if len(found) == 1 else tmp_path) / 'report.html'}\n"
    assert main(["report", str(a / "metrics.jsonl")]) == 2
    assert "metrics.jsonl is neither a run folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(a), str(tmp_path / "empty")]) == 2
    assert "empty is neither a run folder, which train.output names, nor a folder of such" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "RUN is missing" in capsys.readouterr().err
