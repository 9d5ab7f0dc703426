"""What a run goes on from: a checkpoint that fits the run, and corpora that are there."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_corpus import make_corpus

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading import pack_index
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import num_parameters
from megatron_lcl.parallel.mesh import ALONE, Mesh
from megatron_lcl.run_folder import CHECKPOINTS
from megatron_lcl.train import checks, dryrun, resume_point
from megatron_lcl.train.checkpoint.folder import Layout, Progress, choose, progress_text, step_folder
from megatron_lcl.train.checkpoint.mirror import Mirror
from megatron_lcl.train.checks import check_output, check_readable
from megatron_lcl.train.dryrun import dry_run, find_origin
from megatron_lcl.train.heldout import other_rules
from megatron_lcl.train.resume_point import ledger_from, open_origin

STEP = 4


@pytest.fixture(scope="session")
def corpora(once: Callable[..., Any]) -> list[str]:
    """Two of one tokenizer, and one of its own."""

    def make(folder: Path) -> list[str]:
        first = make_corpus(folder / "0", seed=0)
        second = make_corpus(folder / "1", seed=1, tokenizer=first)
        return [str(path) for path in (first, second, make_corpus(folder / "2", seed=2))]

    return once("origin", make)


@pytest.fixture
def mine(corpora: list[str], tmp_path: Path) -> Path:
    """A corpus that the test may remove."""
    return Path(shutil.copytree(corpora[0], tmp_path / "mine"))


def config_of(folder: Path, *paths: Path | str, **fields: Any) -> Config:
    size = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32}
    model = {
        "vision": {"image_size": 16, "patch_size": 8, **size},
        "language": {"context_length": 64, "vocab_size": open_corpus(paths[0]).tokenizer.vocab_size, **size},
        "pool_heads": 2,
    }
    data = {"corpora": [{"path": str(path)} for path in paths], "cache": str(folder / "cache"), "workers": 0}
    data |= {"tokens_per_pack": 64, "images_per_pack": 3}
    train = {"output": str(folder / "run"), "steps": 100, "global_batch": 4, "dtype": "float32"}
    return configs.replace(configs.from_dict({"model": model, "data": data, "train": train}), **fields)


def saved(config: Config, step: int = STEP, before: Path | None = None) -> Path:
    """What is read of a checkpoint of a run with this config after some steps; before: the one that it went on from."""
    run = Path(config.train.output)
    origin = open_origin(before, config, True)
    packs = step * config.train.global_batch
    index = pack_index.PackIndex(config.data, origin.ledger)
    index.prepare(packs)
    progress = Progress(step, packs, index.ledger_at(packs).to_json(), layout=Layout())
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    (folder / "progress.json").write_text(progress_text(progress))
    files = {name: fingerprint(folder / name) for name in ("config.yaml", "progress.json")}
    (folder / MANIFEST).write_text(manifest_text(files))
    return folder


def test_other_corpora_are_named(corpora: list[str], mine: Path, tmp_path: Path) -> None:
    """Also where one has changed at its place, which no setting tells."""
    folder = saved(config_of(tmp_path, mine))
    before = open_corpus(mine).fingerprint
    shutil.move(mine, tmp_path / "former")
    shutil.copytree(corpora[1], mine)
    now, after = config_of(tmp_path, mine), open_corpus(mine).fingerprint
    with pytest.raises(UserError, match=f"{mine} is missing, {mine} is new or has changed"):
        open_origin(folder, now, True)
    allowed = configs.replace(now, data__allow_change=True)
    with pytest.raises(
        UserError, match=rf"in a window of documents of {mine} \(fingerprint {before}\), .* put it back"
    ):
        open_origin(folder, allowed, True)
    shutil.move(mine, tmp_path / "new")
    shutil.move(tmp_path / "former", mine)
    allowed = config_of(tmp_path, tmp_path / "new", data__allow_change=True)
    changes = open_origin(folder, allowed, True).changes(allowed)
    said = f"without {mine} (fingerprint {before}), with {tmp_path / 'new'} (fingerprint {after})"
    (line,) = [line for line in changes.lines() if line.startswith("blend changed")]
    assert line == f"blend changed: {said}, from the window of documents that begins behind pack {4 * STEP}"
    assert changes.new_loss
    moved = config_of(tmp_path, shutil.copytree(mine, tmp_path / "moved"))
    found = open_origin(folder, moved, True).changes(moved)
    assert (found.blend, found.new_loss) == (None, False)


def test_held_out_numbers_by_other_rules_are_told(corpora: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path, corpora[0], train__evaluate_every=2, evaluate__corpus=corpora[1])
    origin = open_origin(saved(config), config, True)
    for lines, said in (
        ([{"step": 2, "heldout/rules": 2}, {"step": 4, "heldout/rules": 3}, {"step": 4, "loss": 1.0}], None),
        ([{"step": 4, "heldout/context_to_image_chance_at_10": 0.1}], None),  # by version 3, before lines named it
        ([{"step": 4, "loss": 1.0}], None),
        ([{"step": 4, "heldout/bits_per_token": 9.0}], None),  # the same by all
        ([{"step": 2, "heldout/rules": 3}, {"step": 4, "heldout/chance_at_10": 0.1}], "an unrecorded version"),
        # the line of step 5 goes at this resume
        ([{"step": 4, "heldout/rules": 2}, {"step": 5, "heldout/rules": 3}], "version 2"),
    ):
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = [*other_rules(config, STEP)]
        found = [re.sub(".* those of step 4 by (.*): not to be compared .*", r"\1", line) for line in told]
        assert found == [said] * bool(said)
    assert [*origin.changes(config).lines()] == [f"warning: {told[0]}"]
    assert not [*other_rules(configs.replace(config, evaluate__corpus=None, train__evaluate_every=0), STEP)]
    made = configs.replace(config, train__steps=STEP)  # and evaluated: no numbers are to come
    assert replace(origin, finished=True).changes(made).warnings == ()
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere")
    elsewhere = configs.replace(config, train__output=str(tmp_path / "elsewhere"))  # a curve of its own
    assert origin.changes(elsewhere).warnings == ()


@pytest.mark.parametrize("steps", [STEP, 100])
def test_the_same_shares_are_no_other_corpora(steps: int, corpora: list[str], tmp_path: Path) -> None:
    """In another order, or by weights of another scale; of a run that goes on, and of one that is finished."""

    def weighted(*weights: tuple[int, float]) -> Config:
        blend = [{"path": corpora[number], "weight": weight} for number, weight in weights]
        return config_of(tmp_path, corpora[0], data__corpora=blend, train__steps=steps)

    folder = saved(weighted((0, 1.0), (1, 3.0)))
    for same in (weighted((1, 3.0), (0, 1.0)), weighted((0, 0.25), (1, 0.75))):
        origin = open_origin(folder, same, True)
        found = origin.changes(same)
        assert (origin.finished, found.blend, found.new_loss) == (steps == STEP, None, False)
        (line,) = found.lines()
        assert line.startswith("changed without effect on what is trained: data.corpora.0.")
    other = weighted((0, 1.0), (1, 2.0))
    if steps == STEP:
        with pytest.raises(UserError, match=r"with data\.corpora\.1\.weight = 3\.0 where this command has 2\.0"):
            open_origin(folder, other, True)
        return
    allowed = configs.replace(other, data__allow_change=True)
    assert open_origin(folder, allowed, True).changes(allowed).new_loss


def test_a_window_that_was_begun_needs_its_corpora(corpora: list[str], mine: Path, tmp_path: Path) -> None:
    """Also where the run has been given others since, and is not behind that window yet."""
    first = saved(config_of(tmp_path, mine))
    other = config_of(tmp_path, corpora[1], data__allow_change=True)
    second = saved(other, STEP + 1, first)
    window = next(e["from_pack"] for e in json.loads((second / "progress.json").read_text())["ledger"]["entries"][1:])
    assert window == 4 * STEP
    open_origin(second, other, True)
    shutil.rmtree(mine)
    with pytest.raises(UserError, match=f"in a window of documents of {mine} "):
        open_origin(second, other, True)
    with pytest.raises(UserError, match="is at none of"):
        pack_index.PackIndex(other.data, open_ledger_of(second, other)).prepare(4 * (STEP + 1))


def test_a_corpus_that_was_moved_is_known_where_it_is(corpora: list[str], mine: Path, tmp_path: Path) -> None:
    """Its window is read to its end from there, and messages name the place."""
    first = saved(config_of(tmp_path, mine))
    there = shutil.move(mine, tmp_path / "there")
    second = saved(config_of(tmp_path, there), STEP + 1, first)
    entries = json.loads((second / "progress.json").read_text())["ledger"]["entries"]
    (entry,) = entries
    assert [(c["path"], c["moved_from"]) for c in entry["blend"]] == [(str(there), [str(mine)])]
    other = config_of(tmp_path, corpora[1], data__allow_change=True)
    changes = open_origin(second, other, True).changes(other)
    assert changes.blend is not None
    assert [path for path, _ in changes.blend.gone] == [str(there)]
    with pytest.raises(UserError, match=f"{there} is missing"):
        open_origin(second, config_of(tmp_path, corpora[1]), True)
    shutil.move(there, mine)  # where it was before will do
    open_origin(second, other, True)
    shutil.move(mine, tmp_path / "away")
    with pytest.raises(UserError, match=f"in a window of documents of {there} "):
        open_origin(second, other, True)


def test_a_named_checkpoint_of_the_run_itself_is_its_newest(corpora: list[str], tmp_path: Path) -> None:
    """Or the command has gone on from it before; and one that is damaged, or another run's, is as ever."""
    config = config_of(tmp_path, corpora[0])
    first, run = saved(config), tmp_path / "run"
    assert choose(run, str(first))[0] == first
    second = saved(config, STEP + 1, first)
    with pytest.raises(
        UserError, match=f"resume = {first} is of this run, which has {second.name} .* remove the later"
    ):
        choose(run, str(first))
    for other in ("auto", str(second), str(run), str(step_folder(tmp_path / "other", STEP))):
        assert choose(run, other)[0] == second
    named = configs.replace(config, checkpoint__resume=str(first))
    third = saved(named, STEP + 2, first)
    assert choose(run, str(first))[0] == third, "a job that is queued again"
    with pytest.raises(UserError, match="is of this run"):
        choose(run, str(second))
    (third / "progress.json").write_text("{}")
    assert choose(run, str(third))[0] == second


def test_a_run_that_has_lost_its_config_has_it_in_a_checkpoint(corpora: list[str], tmp_path: Path) -> None:
    config, run = config_of(tmp_path, corpora[0]), tmp_path / "run"
    folder = saved(config)
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=f"no config.yaml; if it is this run's, .*: cp {folder / 'config.yaml'} {run}$"):
        checks.check_output(run, config)
    shutil.copy(folder / "config.yaml", run)
    checks.check_output(run, config)


def test_the_same_shares_in_another_order_or_scale_are_the_same_blend(
    corpora: list[str], mine: Path, tmp_path: Path
) -> None:
    def weighted(*pairs: tuple[Path | str, float]) -> Config:
        blend = [{"path": str(path), "weight": weight} for path, weight in pairs]
        return config_of(tmp_path, *(path for path, _ in pairs), data__corpora=blend)

    first = saved(weighted((mine, 0.1), (corpora[1], 0.3)))
    before = Ledger.from_json(json.loads((first / "progress.json").read_text())["ledger"])
    for same in (((corpora[1], 0.3), (mine, 0.1)), ((mine, 1), (corpora[1], 3))):
        assert open_ledger_of(first, weighted(*same)) == before
    for other in (((mine, 0.3), (corpora[1], 0.1)), ((mine, 0.1), (corpora[1], 0.31))):
        assert len(open_ledger_of(first, weighted(*other)).blends()) == 2


def test_what_was_read_is_looked_for_where_the_packs_look(
    corpora: list[str], mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At all places that the ledger knows, and by the cache's records where the checkpoint is of an earlier version."""
    first = saved(config_of(tmp_path, mine))
    other = config_of(tmp_path, corpora[1], data__allow_change=True)
    ledger = open_ledger_of(first, other)
    later = saved(other, 50, first)
    progress = json.loads((later / "progress.json").read_text())
    del progress["ledger"]["states"]
    (later / "progress.json").write_text(json.dumps(progress))
    fingerprint, moved = open_corpus(mine).fingerprint, shutil.move(mine, tmp_path / "moved")
    shutil.rmtree(step_folder(tmp_path / "run", STEP))
    pack_index.PackIndex(other.data, open_ledger_of(later, other)).prepare(4 * 50)
    open_origin(later, other, True)
    with pytest.raises(UserError, match=f"in a window of documents of {mine} "):
        check_readable(ledger, other, 4 * STEP)
    blend = [{"path": str(moved), "fingerprint": fingerprint, "weight": 1.0}]
    ledger = replace(ledger, entries=(*ledger.entries, {"from_pack": 1000, "blend": blend}))
    check_readable(ledger, other, 4 * STEP)

    def denied(path: Path | str, *cache: Any) -> Any:
        if path == str(mine):
            raise PermissionError(13, "Permission denied", path)
        return open_corpus(path, *cache)

    monkeypatch.setattr(checks, "open_corpus", denied)
    monkeypatch.setattr(pack_index, "open_corpus", denied)
    check_readable(ledger, other, 4 * STEP)
    pack_index.PackIndex(other.data, ledger).prepare(4 * STEP)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match=f"in a window of documents of {mine} .* or may not be read"):
        check_readable(ledger, other, 4 * STEP)


def open_ledger_of(folder: Path, config: Config) -> Ledger:
    progress = json.loads((folder / "progress.json").read_text())
    previous = Ledger.from_json(progress["ledger"])
    return ledger_from(config, replace(Progress(0, 0, {}), step=progress["step"], packs=progress["packs"]), previous)


def test_another_tokenizer_is_refused_whatever_is_allowed(corpora: list[str], mine: Path, tmp_path: Path) -> None:
    folder = saved(config_of(tmp_path, mine))
    with pytest.raises(UserError, match=f"{corpora[2]} has another tokenizer than the corpora that this run has read"):
        open_origin(folder, config_of(tmp_path, corpora[2], data__allow_change=True), True)


def words(text: str) -> dict[str, str]:
    """The lines of a dry run by their first word."""
    return {line[:12].strip(): line[12:] for line in text.splitlines() if line[:12].strip()}


@pytest.mark.parametrize("kind", ["own", "named", "mirror", "url"])
def test_a_dry_run_goes_on_from_what_the_start_does(corpora: list[str], tmp_path: Path, place: str, kind: str) -> None:
    """And refuses what that refuses: another model, another seed, other corpora."""
    config = config_of(tmp_path, corpora[0])
    folder, shown = saved(config), {"own": f"step-{STEP:08d}"}.get(kind, f"{place}/step-{STEP:08d}")
    if kind == "named":
        config, shown = (
            config_of(tmp_path, corpora[0], train__output="new", checkpoint__resume=str(folder)),
            str(folder),
        )
    elif kind != "own":
        Mirror(place).upload(folder, None)
        shutil.rmtree(folder.parent)
        field = {"mirror": {"checkpoint__mirror": place}, "url": {"checkpoint__resume": shown}}[kind]
        config = configs.replace(config, **field)
    origin, lines = find_origin(config)
    assert (origin.progress.step, origin.progress.packs) == (STEP, 4 * STEP)
    assert lines[0] == f"run         {config.train.output}: goes on from {shown}, if it verifies"
    for fields, said in (
        ({"model__vision__layers": 2}, "holds a run of another model"),
        ({"data__seed": 5}, "seed is 5, but this run began with 0"),
        ({"data__corpora": [{"path": corpora[1]}]}, f"{corpora[0]} is missing, {corpora[1]} is new"),
        ({"train__steps": STEP, "optimizer__lr": 1.0}, "has (made|all steps)"),
    ):
        with pytest.raises(UserError, match=said):
            find_origin(configs.replace(config, **fields))


def test_a_run_that_made_no_step_does_not_keep_others_out(corpora: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path, corpora[0])
    run = Path(config.train.output)
    run.mkdir()
    (run / "config.yaml").write_text(configs.to_yaml(config))
    other = configs.replace(config, model__vision__layers=2)
    check_output(run, other)
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 0, "images_per_pack": 4}\n')
    check_output(run, other)
    metrics.write_text('{"step": 0, "images_per_pack": 4}\n{"step": 1, "loss": 3.5}\n')
    with pytest.raises(UserError, match="holds a run of another model"):
        check_output(run, other)
    metrics.unlink()
    saved(config)
    with pytest.raises(UserError, match="holds a run of another model"):
        check_output(run, other)


@pytest.mark.parametrize("kind", ["own", "named", "mirror"])
@pytest.mark.parametrize("name", ["progress.json", "config.yaml"])
def test_a_dry_run_plans_for_no_damaged_checkpoint(
    corpora: list[str], tmp_path: Path, place: str, kind: str, name: str
) -> None:
    """It takes the one before, as the start does, and where there is none refuses as that does."""
    config = config_of(tmp_path, corpora[0])
    before, folder = saved(config), saved(config, STEP + 1)
    (folder / name).write_text("damaged")
    if kind == "named":
        config = config_of(tmp_path, corpora[0], train__output="new", checkpoint__resume=str(tmp_path / "run"))
    if kind == "mirror":
        for file in (folder / MANIFEST, folder / "config.yaml", folder / "progress.json"):
            Store(f"{place}/{folder.name}").put(file.name, file)
        shutil.rmtree(folder.parent)
        config = configs.replace(config, checkpoint__mirror=place)
        Store(place).put("run.json", json.dumps({"train.output": config.train.output}).encode())
    else:
        origin, lines = find_origin(config)
        assert origin.progress.step == STEP
        assert lines[0].endswith(f"goes on from {before if kind == 'named' else before.name}, if it verifies")
        shutil.rmtree(before)
    said = {"own": "no checkpoint in .* is whole", "named": "is not a whole checkpoint", "mirror": "is damaged"}[kind]
    with pytest.raises(UserError, match=rf"{said}.*{name}: 7 bytes"):
        find_origin(config)


def test_what_a_dry_run_says_of_a_named_checkpoint(
    corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packs are those that come next, not the first ones."""
    asked: list[int] = []
    summarize = dryrun.summarize_config

    def asking(*arguments: Any, **more: Any) -> Any:
        asked.append(arguments[3])
        return summarize(*arguments, **more)

    monkeypatch.setattr(dryrun, "summarize_config", asking)
    folder = saved(config_of(tmp_path, corpora[0]))
    new = config_of(tmp_path, corpora[0], train__output=str(tmp_path / "new"), checkpoint__resume=str(folder))
    lines = words(dry_run(new, [], 1, 1))
    assert f"goes on from {folder}" in lines["run"]
    assert asked == [4 * STEP]
    index = pack_index.PackIndex(new.data, open_origin(folder, new, False).ledger)
    to_come = range(4 * STEP, 4 * 100)
    read = sum(int(np.count_nonzero(index[number].entries["part"] == 0)) for number in to_come) / 24
    index.close()
    said = re.fullmatch(rf"in the 96 steps to come about ([\d.]+) of {corpora[0]}", lines["epochs"])
    assert said is not None
    assert float(said[1]) == pytest.approx(read, rel=0.1)


def test_room_for_a_checkpoint(corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed save has left is room too, as is what another run is writing that has the folder; where all steps
    are made none is needed."""
    config, folder = config_of(tmp_path, corpora[0]), tmp_path / "run" / CHECKPOINTS
    left, room = folder / ".step-00000008.tmp" / "state", 20 * num_parameters(config.model)

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(total=room, free=room - sum(x.stat().st_size for x in folder.rglob("*") if x.is_file()))

    def start() -> Any:
        signals, watchdog = SimpleNamespace(received=0), SimpleNamespace(left=lambda: 0.0)
        with contextlib.ExitStack() as end:
            return resume_point.resolve_resume_point(config, Mesh(ALONE, ALONE), end, signals, watchdog)  # type: ignore

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(resume_point, "_resolve", lambda *_: "resolved")
    left.mkdir(parents=True)
    with (left / "a.pt").open("wb") as file:
        file.truncate(room - 1)
    checks.check(config, 1)
    assert left.exists(), "nobody has locked the folder"
    assert start() == "resolved"
    assert list(folder.iterdir()) == []
    saved(config)
    with pytest.raises(UserError, match="a checkpoint of this model takes at least"):
        start()
    saved(config, config.train.steps)
    assert start() == "resolved"
