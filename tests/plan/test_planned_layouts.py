"""Protects the ranking: what is legal, what fits, what is fastest, and the reason for the rest in one line."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from plan.stand_ins import long_vision, needs, target_of
from plan.test_predict import CONTEXT, IMAGES, config_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.cli.arguments import overrides_of
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.ledger import open_run_ledger
from megatron_lcl.data.loading.source import open_source
from megatron_lcl.errors import UserError
from megatron_lcl.objectives import create
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.plan import describe, layouts, run
from megatron_lcl.plan.calibrate import ROUNDS, Calibration, calibrate, network
from megatron_lcl.plan.calibrate import rates_of as measured_rates
from megatron_lcl.plan.describe import lines, numbers_of
from megatron_lcl.plan.layouts import Layout, Target, confirm, key_of, survey
from megatron_lcl.train.kernels import check_kernels
from megatron_lcl.train.layout import check_layout
from megatron_lcl.train.memory import estimate, slots_of
from megatron_lcl.train.simulate import Usage
from megatron_lcl.units import in_bytes

ROOT = Path(__file__).parents[2]
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer layouts are tried."""
    for name in ("TENSOR", "PIPELINE", "MICRO_BATCH"):
        monkeypatch.setattr(layouts, name, (1, 2))


def test_every_layout_is_ranked_too_large_or_refused() -> None:
    config, target = config_of(), target_of()
    passed, too_large, refused = survey(config, target)
    tried = {key_of(c) for c in layouts.layouts(config, 4)}
    assert len(tried) == len(passed) + len(refused)
    assert not too_large
    assert {key_of(layout.config) for layout in [*passed, *refused]} == tried
    assert [p.seconds for p in passed] == sorted(p.seconds for p in passed)
    assert config in [p.config for p in passed], "the config's own"
    for layout in passed:
        check_layout(layout.config, 4)
    for layout in refused:
        with pytest.raises(UserError) as caught:
            check_layout(layout.config, 4)
        assert str(caught.value) == layout.refused
    assert any("zero.stage = 3 with contrast.strategy = retain" in layout.refused for layout in refused)


def test_blocks_that_are_to_be_compiled_are_in_no_layout_that_cannot() -> None:
    """Or `--write` would write a config that `train` refuses."""
    config = configs.replace(config_of(), train__compile=True)
    passed, _, refused = survey(config, target_of())
    for layout in passed:
        check_kernels(layout.config, elsewhere=True)
        assert (layout.config.parallel.tensor, layout.config.zero.stage < 3) == (1, True)
    assert any("train.compile is set, but zero.stage is 3" in layout.refused for layout in refused)
    assert any("train.compile is set, but parallel.tensor is 2" in layout.refused for layout in refused)


@pytest.mark.parametrize("options", [{"offload_param": {"device": "cpu"}}, {"zero_hpz_partition_size": 2}])
def test_what_deepspeed_has_for_one_stage_alone_leaves_that_one(options: dict[str, Any]) -> None:
    """Or the simulation of another would end the command."""
    config = config_of(zero__stage=3, contrast__strategy="recompute", deepspeed={"zero_optimization": options})
    passed, _, refused = survey(config, target_of())
    assert {layout.config.zero.stage for layout in passed} == {3}
    said = {layout.refused for layout in refused if layout.config.zero.stage < 3}
    assert f"deepspeed.zero_optimization.{next(iter(options))} needs zero.stage = 3, not 2" in said


def test_replicas_that_share_no_parts_are_in_no_layout() -> None:
    options = {"zero_hpz_partition_size": 3}
    config = config_of(zero__stage=3, contrast__strategy="recompute", deepspeed={"zero_optimization": options})
    passed, _, refused = survey(config, target_of())
    assert not passed
    assert any("zero_hpz_partition_size = 3 does not divide 4 data" in layout.refused for layout in refused)


def test_the_bound_discards_what_cannot_fit() -> None:
    config = config_of()
    totals = sorted(layout.needs for layout in survey(config, target_of())[0])
    room = totals[len(totals) // 2]
    passed, too_large, _ = survey(config, target_of(room=room))
    assert passed
    assert too_large
    assert max(p.needs for p in passed) <= room < min(t.needs for t in too_large)
    assert [t.needs for t in too_large] == sorted(t.needs for t in too_large)
    for layout in too_large:
        assert layout.needs == estimate(layout.config, 4, IMAGES).total


def test_what_is_offloaded_lies_on_the_host() -> None:
    config = config_of(deepspeed=OFFLOADED)
    target = target_of()
    least = estimate(config, 4, IMAGES)
    of_all = {"needs": least.total, "gradients": least.gradients}
    on_host = Layout(config, "", least.total - least.optimizer, least.gradients, least.optimizer)
    assert layouts.bound(config, target) == on_host
    assert layouts.bound(config, dataclasses.replace(target, on_host=False)) == Layout(config, **of_all)
    nowhere = config_of(deepspeed={"zero_optimization": {"offload_optimizer": {"device": "none"}}})
    assert layouts.bound(nowhere, target) == Layout(nowhere, **of_all)


def test_what_is_offloaded_is_told_alike_on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run's devices are, not what the planning machine has."""
    moved = {"device": "cpu"}
    config = config_of(
        zero__stage=3, contrast__strategy="recompute",
        deepspeed={"zero_optimization": {"offload_optimizer": moved, "offload_param": moved}},
    )  # fmt: skip
    found = []
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has_gpu: has)
        target = target_of()
        found.append([layouts.bound(config, dataclasses.replace(target, on_host=on_host)) for on_host in (True, False)])
    assert found[0] == found[1]
    assert found[0][0].offloaded > 0 == found[0][1].offloaded


def test_the_first_whose_simulated_step_fits_is_the_best() -> None:
    target = target_of(room=1e9)
    passed, *_ = survey(config_of(), target)
    said, asked = list[str](), list[Config]()

    def simulated(config: Config, processes: int, images: int, rank: int) -> Usage:
        asked.append(config)
        assert (processes, images) == (4, IMAGES)
        return needs(2e9 if len(asked) == 1 else 1e8)

    left, failed = confirm(passed, target, said.append, simulated)
    assert [f.config for f in failed] == [passed[0].config]
    assert failed[0].needs == 2e9
    assert left[0].needs == 1e8
    assert len(said) == 2
    worse = {key_of(other.config) for other in passed if layouts._needs_as_much(other, passed[0])}
    assert key_of(passed[0].config) in worse

    def split(config: Config) -> Any:
        return config.parallel, config.zero, config.contrast.strategy, config.train.activation_checkpointing

    first = passed[0].config
    alike = [other.config for other in passed if split(other.config) == split(first)]
    assert {config.train.micro_batch for config in alike} == {1, 2}
    as_large = [config for config in alike if config.train.micro_batch >= first.train.micro_batch]
    assert {key_of(config) for config in alike} & worse == {*map(key_of, as_large)}
    assert [p.config for p in passed if key_of(p.config) not in worse] == [layout.config for layout in left]
    never, failed = confirm(passed, target, said.append, lambda *_: needs(2e9))
    assert len(failed) == layouts.MAX_SIMULATED or not never


def test_each_stage_is_simulated() -> None:
    config, target, ranks = config_of(parallel__pipeline=4), target_of(8), list[int]()

    def simulated(config: Config, processes: int, images: int, rank: int) -> Usage:
        ranks.append(rank)
        return needs(1e6 * (1 + rank))

    (layout,), _ = confirm([Layout(config)], target, lambda _: None, simulated)
    assert sorted(ranks) == [0, 2, 4, 6], "of two replicas: each stage's first process"
    assert layout.needs == 7e6
    assert [usage.peak for usage in layout.usages] == [1e6, 3e6, 5e6, 7e6]


def test_every_stage_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need the same in one row."""
    peaks = {0: 1e6, 1: 2e6, 2: 2e6, 3: 5e6}
    simulated = functools.partial(confirm, simulated=lambda *given: needs(peaks[given[3]]))
    monkeypatch.setattr(run, "confirm", simulated)
    monkeypatch.setattr(run, "survey", lambda config, target: (survey_of_own(config, target), [], []))
    config = long_vision(contrast__strategy="retain", zero__stage=1)
    text = [line.strip() for line in lines(run.plan(config, 4, images_per_pack=IMAGES))]
    head = next(n for n, line in enumerate(text) if line.startswith("by stage"))
    assert "activations  temporary       peak" in text[head]
    rows = [re.split(r"\s{2,}", line) for line in text[head + 1 :] if line.startswith("stage")]
    assert [(row[0], row[-1]) for row in rows] == [("stage 0", "1 MB"), ("stages 1-2", "2 MB"), ("stage 3", "5 MB")]
    assert f"best        {run.plan(config, 4, images_per_pack=IMAGES).best.name}, as the config has it" in text
    after = text[text.index(next(line for line in text if line.startswith("best"))) + 1]
    assert after == describe.STRATEGIES


def survey_of_own(config: Config, target: Target) -> list[Layout]:
    """The config's own layout alone."""
    (own,) = [one for one in survey(config, target)[0] if one.config == config]
    return [own]


def test_images_that_nobody_gives_are_assumed() -> None:
    config = configs.load(ROOT / "configs" / "lcl_vitg_interleaved.yaml")

    def images(config: Config, given: int | None) -> tuple[int, bool]:
        text, assumed = run.text_per_image(config, given)
        return layouts.slots(config, text), assumed

    assert images(config, None) == (round(8192 / (256 + 2 + 100)), True)
    for given in range(1, 32):
        assert images(config, given) == (given, False)
    assert images(configs.replace(config, data__images_per_pack=7), None) == (7, False)
    with pytest.raises(UserError, match="--images-per-pack 0"):
        images(config, 0)
    with pytest.raises(UserError, match="--images-per-pack 33: a pack of 8,192 tokens has room for 32 images of 256 "):
        images(config, 33)
    with pytest.raises(UserError, match=r"data\.images_per_pack = 7; give --data\.images_per_pack 23 in its place"):
        images(configs.replace(config, data__images_per_pack=7), 23)  # which all else would plan with 7


@pytest.mark.parametrize("objective", ["lcl", "clip"])
def test_each_phase_has_as_many_images_as_a_run_chooses_for_it(objective: str, tiny: list[str]) -> None:
    """From documents with as much text."""
    phases = "[{steps: 2, image_size: 8}, {steps: 2, image_size: 16, tokens_per_pack: 320}, {steps: 2, image_size: 16}]"
    settings = {"data.images_per_pack": "null", "model.vision.image_size": "32", "objective.name": objective}
    config = configs.load(None, {**overrides_of(tiny), **settings, "schedule.phases": phases})
    placeholders = 16 if objective == "lcl" else 0
    sequences = create(config).sequences
    source = open_source(open_corpus(config.data.corpora[0].path), config.data, 16, 64, 1, sequences)
    text = source.tokens.sum() / source.images.sum() - placeholders
    chosen = slots_of(open_run_ledger(config, sequences), config)
    assert [layouts.slots(phase.config, text) for phase in phases_of(config)] == chosen
    assert len(set(chosen)) == (4 if objective == "lcl" else 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"gpus": 8, "gpu": "h1000"},
            "--gpu h1000 is not known; known are h100 (80 GB), h200 (141 GB), b200 (180 GB), ",
        ),
        ({"gpus": 8, "gpu": "tpu"}, "--gpu tpu is not known"),
        ({"gpus": 20}, "--gpus 20 is no multiple of 8 a node; the nearest are 16 and 24"),
        ({"gpus": 20, "nodes": 3}, "--gpus 20 do not divide into 3 nodes; the nearest number that does is 2"),
        ({"gpus": 0}, "--gpus 0: give a number above 0"),
        ({"gpus": 2, "gpu": "cpu", "nodes": 2}, "--nodes 2 with --gpu cpu"),
        ({"gpus": 512}, "no layout is legal on 512 processes: "),
    ],
)
def test_errors_are_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        run.plan(config_of(), images_per_pack=IMAGES, **arguments)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__freeze": ("*",)}, "freezes all that the objective lcl trains"),
        ({"optimizer__name": "muon", "deepspeed": OFFLOADED}, "remove the offload"),
    ],
)
def test_nothing_is_planned_that_train_refuses_in_every_layout(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run.plan(config_of(**changes), 4, images_per_pack=IMAGES)


@pytest.mark.parametrize("strategy", ["retain", "auto"])
def test_where_no_layout_is_legal_the_reason_is_that_of_the_layout_asked_for(strategy: str) -> None:
    """Or of the one most like it: what refuses most of those that are tried may be no fault of the config."""
    config = config_of(train__micro_batch=2, parallel__tensor=2, contrast__strategy=strategy)
    with pytest.raises(UserError) as asked:
        check_layout(config, 24)
    with pytest.raises(UserError) as caught:
        run.plan(config, 24, images_per_pack=IMAGES)
    assert str(caught.value) == f"no layout is legal on 24 processes: {asked.value}"
    config = configs.replace(config, train__micro_batch=3)
    with pytest.raises(UserError, match="no layout is legal on 24 processes: "):
        run.plan(config, 24, images_per_pack=IMAGES)


def test_where_nothing_fits_the_nearest_that_does_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(train__global_batch=64)
    least = min(layout.needs for layout in survey(config, target_of(1))[0])
    monkeypatch.setattr(run, "USABLE", 0.98 * least / 80e9)
    with pytest.raises(UserError) as caught:
        run.plan(config, 1, images_per_pack=IMAGES)
    said = str(caught.value)
    assert re.match(
        r"nothing fits into \S+ [kM]B a process: the least is \S+ [kM]B, with tensor 1, pipeline 1, ZeRO-", said
    )
    assert "; the nearest number of GPUs for which a bound passes is 2" in said


def test_where_no_simulated_step_fits_the_smallest_of_the_rest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "confirm", functools.partial(confirm, simulated=lambda *_: needs(1e12)))
    with pytest.raises(UserError) as caught:
        run.plan(config_of(), 4, images_per_pack=IMAGES)
    said = str(caught.value)
    assert said.startswith(
        "the simulated steps of the 4 fastest layouts do not fit into 73.6 GB a process; of the rest "
    )
    assert "is tensor" in said


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated steps that need nothing."""
    monkeypatch.setattr(run, "confirm", functools.partial(confirm, simulated=lambda *_: needs(1e6)))


@pytest.mark.usefixtures("quick")
def test_the_command_says_what_was_found_and_writes_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, best, numbers = (tmp_path / name for name in ("run.yaml", "configs/best.yaml", "of/plan.json"))
    file.write_text(configs.to_yaml(config_of(train__micro_batch=2)))
    arguments = ["plan", "--config", str(file), "--gpus", "4", "--images-per-pack", "2", "--images", "864000"]
    assert main([*arguments, "--json", str(numbers), "--write", str(best), "--train.steps", "77"]) == 0
    text = capsys.readouterr().out
    planned = json.loads(numbers.read_text())
    assert planned["layout"] in text
    assert planned["images_per_second"] * planned["step_seconds"] == pytest.approx(8 * 2), "8 packs of 2 images"
    assert planned["tokens_per_second"] * planned["step_seconds"] == pytest.approx(8 * CONTEXT), "which are full"
    assert (planned["processes"], planned["is_measured"]) == (4, False)
    (name,) = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("best ")]
    written = configs.load(best)
    assert layouts.name_of(written) == name.removesuffix(", as the config has it")
    assert written.train.steps == 77
    assert written == configs.replace(
        config_of(train__steps=77),
        **{key: dataclasses.asdict(getattr(written, key)) for key in ("parallel", "zero", "contrast", "train")},
    )
    for words in (
        "nothing was measured on this device",
        "run         864,000 images",
        " layouts are refused:",
        "FLOPs  ",
    ):
        assert words in text
    assert "  <- the config's" in text or "as the config has it" in text
    assert main([*arguments, "--write", str(best)]) == 2
    assert f"{best} exists; name another file for --write" in capsys.readouterr().err
    assert main([*arguments[:-2], "--images", "-1"]) == 2
    assert "--images -1: give a number above 0" in capsys.readouterr().err
    before, limits = numbers.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))
    try:
        assert main([*arguments, "--json", str(numbers)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert numbers.read_text() == before, "not a part of it, which `report` would refuse"
    assert main([*arguments, "--train.stepz", "1"]) == 2
    assert "train.steps" in capsys.readouterr().err


def test_where_the_disk_is_full_nothing_is_written(tmp_path: Path) -> None:
    """And the same command can be run again."""
    limits, config = resource.getrlimit(resource.RLIMIT_FSIZE), config_of()
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            run.write(config, tmp_path / "best.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    run.write(config, tmp_path / "best.yaml")
    assert configs.load(tmp_path / "best.yaml") == config


def test_gradients_and_what_is_offloaded_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is offloaded as it was simulated; of a layout that was not, by the bound's formula, as all gradients are."""
    usage = needs(7e6, optimizer=5e6)
    monkeypatch.setattr(run, "confirm", functools.partial(confirm, simulated=lambda *_: usage))
    config = config_of(deepspeed=OFFLOADED)
    found = run.plan(config, 4, images_per_pack=IMAGES)
    layout = found.best
    least = estimate(layout.config, 4, IMAGES)
    assert (layout.gradients, layout.offloaded, layout.needs) == (least.gradients, 5e6, 7e6 - least.optimizer)
    text = "\n".join(lines(found))
    assert f"gradients, in these: {in_bytes(least.gradients)} once they are summed" in text
    assert "on the host: 5 MB a process, 20 MB a node" in text
    numbers = numbers_of(layout, "h100", 4)
    assert (numbers["memory_gradients_bytes"], numbers["memory_offloaded_bytes"]) == (least.gradients, 5e6)
    other = found.layouts[1]
    assert not other.usages
    least, numbers = estimate(other.config, 4, IMAGES), numbers_of(other, "h100", 4)
    assert (numbers["memory_gradients_bytes"], numbers["memory_offloaded_bytes"]) == (least.gradients, least.optimizer)
    nowhere = config_of(deepspeed={"zero_optimization": {"offload_optimizer": {"device": "none"}}})
    nothing_offloaded = run.plan(nowhere, 4, images_per_pack=IMAGES)
    assert nothing_offloaded.best.offloaded == 0
    text = "\n".join(lines(nothing_offloaded))
    assert "on the host" not in text
    assert "nothing offloaded" in text


@pytest.mark.usefixtures("quick")
def test_the_configs_own_layout_is_known_where_it_leaves_the_strategy_open() -> None:
    config = config_of(contrast__strategy="auto")
    found = run.plan(config, 4, images_per_pack=IMAGES)
    assert found.own is not None
    assert found.own.config.contrast.strategy == "retain", "the faster one"
    assert dataclasses.replace(found.own.config, contrast=config.contrast) == config


@pytest.mark.usefixtures("quick")
def test_phases_are_added_up() -> None:
    early = {"steps": 3, "image_size": 16}
    found = run.plan(config_of(train__steps=10, schedule__phases=[early]), 2, images_per_pack=IMAGES)
    (_, first), (_, rest) = found.phases(found.best)
    more = round(CONTEXT / (4 + (CONTEXT / IMAGES - 16)))  # with 4 patches in place of 16, and as much text an image
    assert (first.images, rest.images) == (8 * more, 8 * IMAGES)
    assert more > IMAGES
    assert first.seconds <= rest.seconds
    assert first.flops.vision < rest.flops.vision
    assert found.best.prediction == rest
    text = "\n".join(lines(found))
    assert "phase 2     of 2, in which it spends most: steps 4 to 10" in text
    assert f"and {IMAGES} images\n            by phase: {more}, {IMAGES} images a pack" in text
    assert f"run         {8 * (3 * more + 7 * IMAGES)} images" in text
    given = run.plan(config_of(train__steps=10, schedule__phases=[early], data__images_per_pack=IMAGES), 2)
    assert [of.images for _, of in given.phases(given.best)] == [8 * IMAGES, 8 * IMAGES]
    assert "by phase" not in "\n".join(lines(given))


@pytest.mark.usefixtures("quick")
def test_what_is_written_can_be_trained(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = tmp_path / "best.yaml"
    file = tmp_path / "empty.yaml"
    file.write_text("train: {dtype: float32}\n")
    assert main(["plan", "--config", str(file), "--gpus", "2", *tiny, "--write", str(best)]) == 0
    assert main(["train", "--config", str(best), "--dry-run", "--processes", "2"]) == 0
    assert "checks      passed" in capsys.readouterr().out


def test_this_machine_is_measured() -> None:
    calibration = Calibration(config_of(), IMAGES)
    for _ in range(ROUNDS):
        calibration.round()
    rates = measured_rates([(calibration.found(), 1e9, 1e-5)])
    assert min(*rates.matmul.values(), *rates.attention.values(), rates.elements, rates.memory) > 1e6
    assert 1e-7 < rates.kernel < 1e-2
    assert rates.peak == max(rates.matmul.values())


def test_a_rate_is_of_the_operations_that_torch_counts() -> None:
    """By a clock that an operation advances by a second, and a reading by little; half of an attention is masked."""
    readings, mapping = itertools.count(), {torch.ops.aten.addmm_: addmm_flop.__wrapped__}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
        calibration = Calibration(config_of(), IMAGES, lambda: counter.get_total_flops() + 1e-3 * next(readings))
        calibration.round()
    found = calibration.found()
    rates = {name: rate for name, rate in found.items() if name.startswith(("matmul", "attention"))}
    assert rates == pytest.approx({**dict.fromkeys(rates, 1.0), "attention language": 0.5}, rel=1e-3)
    assert len(rates) == 5


@pytest.mark.slow
def test_processes_measure_together() -> None:
    rates = calibrate(config_of(), 2, IMAGES)
    assert rates.collective > 0
    assert 1e5 < rates.intra < 1e12


@pytest.mark.parametrize(("small", "rate"), [(1e-3, 1.0), (0.5, 2.0), (0.999, 10.0), (1.0, 10.0), (2.0, 10.0)])
def test_no_network_is_without_end(small: float, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a large message takes one second, and a small one may by chance take as long."""
    monkeypatch.setattr(Axis, "of_group", lambda _: Axis(size=2, ranks=(0, 1)))
    taken = iter([1.0, small])
    monkeypatch.setattr("megatron_lcl.plan.calibrate._there_and_back", lambda *_: next(taken))
    alone = 2 * 4 * (1 << 21)
    assert network() == (pytest.approx(rate * alone, rel=2e-3), pytest.approx(small / 2))
