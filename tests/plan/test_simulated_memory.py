"""Protects the memory that a plan says: of each stage, of stages that are alike, and from short simulations."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
from plan.stand_ins import long_vision, needs, target_of
from plan.test_predict import IMAGES, config_of

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.plan.layouts import Layout, confirm
from megatron_lcl.plan.memory import simulate_shallow
from megatron_lcl.train import simulate as simulation
from megatron_lcl.train.fits import predicted
from megatron_lcl.train.memory import estimate
from megatron_lcl.train.simulate import Peaks, Usage, simulate, usage_of, usages_of


def test_a_gpu_has_the_next_steps_batches_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the process that reads them, which is of the first stage: it may need more than the others by them."""
    config, size = config_of(parallel__pipeline=2, train__global_batch=8), 5e6

    def simulated(config: Config, processes: int, images: int, rank: int) -> Usage:
        return needs(1e8 + size + (1e6 if rank else 0), batches=size)

    monkeypatch.setattr(simulation, "simulate", simulated)
    assert predicted(config, 4, [IMAGES], on_gpu=True) == 1e8 + 2 * size
    assert predicted(config, 4, [IMAGES], on_gpu=False) == 1e8 + size + 1e6
    assert capsys.readouterr().err == 2 * "megatron-lcl: simulating a step of 4 processes, which may take minutes\n"
    for target, peaks in (
        (target_of(), [1e8 + 2 * size, 1e8 + size + 1e6]),
        (dataclasses.replace(target_of(), on_host=False), [1e8 + size, 1e8 + size + 1e6]),
    ):
        (layout,), _ = confirm([Layout(config)], target, lambda _: None, simulated)
        assert layout.needs == max(peaks)
        assert [usage.peak for usage in layout.usages] == peaks
        assert [usage.batches for usage in layout.usages] == [size * (1 + target.on_host), size]


@pytest.mark.parametrize(
    ("changes", "firsts"),
    [
        ({"contrast__strategy": "retain"}, [0, 1, 3]),
        ({"contrast__strategy": "recompute"}, [0, 1, 2, 3]),
        ({"contrast__strategy": "recompute", "train__global_batch": 6}, [0, 1, 2, 3]),
        ({"contrast__strategy": "recompute", "train__global_batch": 4}, [0, 1, 3]),
        ({"contrast__strategy": "retain", "train__freeze": ("vision.blocks.2.*",)}, [0, 1, 3]),
        ({"contrast__strategy": "retain", "train__freeze": ("vision.blocks.3.*",)}, [0, 1, 2, 3]),
        ({"contrast__strategy": "retain", "model__vision__drop_path": 0.1}, [0, 1, 3]),
        (
            {
                "contrast__strategy": "retain",
                "train__activation_checkpointing": "full",
                "train__activation_checkpointing_every": 3,
            },
            [0, 1, 2, 3],
        ),
    ],
)
def test_stages_that_are_alike_are_simulated_once(
    changes: dict[str, Any], firsts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal layers, and as many micro-batches in flight: with 8 micro-batches a step 4, 3, 2 and 1."""
    config, ranks = long_vision(**changes), list[int]()

    def simulated(config: Config, processes: int, images: int, rank: int) -> Usage:
        ranks.append(rank)
        return needs(1e6 * (1 + rank))

    found = usages_of(config, 8, IMAGES, True, partial(simulate_shallow, simulated=simulated))
    assert sorted(ranks) == [2 * stage for stage in firsts]
    ranks.clear()
    monkeypatch.setattr(simulation, "simulate", simulated)
    assert predicted(config, 8, [IMAGES], on_gpu=True) == max(usage.peak for usage in found)
    assert sorted(ranks) == [2 * stage for stage in firsts], "nor when a run starts"
    assert [usage.peak for usage in found] == [1e6 * (1 + 2 * max(f for f in firsts if f <= s)) for s in range(4)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stages_said_to_be_alike_need_the_same() -> None:
    """Each simulated by itself."""
    config = long_vision(contrast__strategy="retain", train__global_batch=4)
    kinds = simulation.kinds_of_stages(config, 4)
    assert kinds[1] == kinds[2]
    assert simulate(config, 4, IMAGES, 1) == simulate(config, 4, IMAGES, 2)


def test_memory_is_linear_in_blocks_and_shared_by_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model__vision__layers=20, model__language__layers=9, train__global_batch=512)
    asked: list[tuple[int, int, int, int]] = []

    def simulated(config: Config, processes: int, images: int, rank: int) -> Usage:
        vision, language = config.model.vision.layers, config.model.language.layers
        asked.append((vision, language, processes, config.train.global_batch))
        size = 100.0 + 7 * vision + 3 * language
        before, after = Peaks(5 * size, size / 2, 6 * size, size), Peaks(3 * size, 4.0, 4 * size, 2.0)
        return Usage(size, 2 * size, 5.0, size, before, after, 2 * size, 3.0, 0.1 + language / 100, 7.0)

    shallow = partial(simulate_shallow, simulated=simulated)
    found = usage_of(config, 32, IMAGES, 0, shallow)
    assert asked == [(2, 2, 32, 512), (4, 2, 32, 512), (2, 4, 32, 512)]
    before, after = Peaks(1335.0, 133.5, 1602.0, 267.0), Peaks(801.0, 4.0, 1068.0, 2.0)
    assert found == Usage(267.0, 534.0, 5.0, 267.0, before, after, 534.0, 3.0, 0.14, 7.0)
    assert found.process == pytest.approx(1602.0 + 1.14 * 133.5), "the largest share of the heap, not extrapolated"
    asked.clear()
    many = usage_of(config, 256, IMAGES, 0, shallow)
    assert asked[0] == (2, 2, 64, 128), "as many micro-batches a replica"
    whole, part = (
        estimate(configs.replace(config, train__global_batch=2 * n), n, IMAGES, on_gpu=False) for n in (256, 64)
    )
    less = whole.optimizer - part.optimizer
    assert less < 0
    assert many.optimizer == pytest.approx(534.0 + less)
    assert many.graphs == found.graphs
    features = 4 * (2 * config.model.language.width + 2) * (512 - 128) * IMAGES
    others = sum(getattr(whole, name) - getattr(part, name) for name in ("parameters", "optimizer", "gradients"))
    assert many.peak == pytest.approx(1335.0 + others + features)
    asked.clear()
    monkeypatch.setattr(simulation, "simulate", simulated)
    size = 100.0 + 7 * 20 + 3 * 9
    assert predicted(config, 256, [IMAGES], on_gpu=True) == pytest.approx(5 * size + 5.0 + others + features)
    assert asked == [(20, 9, 64, 128)], "nor are more replicas simulated when a run starts, which has all blocks"
    alone = configs.replace(config, objective__name="generation")
    assert usage_of(alone, 256, IMAGES, 0, shallow).network == 267.0, "without a contrast nobody gathers features"


def test_the_stage_that_has_the_head_has_the_features_of_all_replicas() -> None:
    config = config_of(parallel__pipeline=2, train__global_batch=512)
    first, last = (usage_of(config, 512, IMAGES, stage, lambda *_: needs(1e6)).network for stage in (0, 1))
    assert (first, last) == (0, 4 * (2 * config.model.language.width + 2) * (512 - 128) * IMAGES)


@pytest.mark.slow
def test_a_short_simulation_says_what_a_whole_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight and four blocks on eight replicas, from two and four on four."""
    config = config_of(
        model__vision__layers=8, model__language__layers=4, model__vision__width=48, model__language__width=64,
        train__global_batch=8,
    )  # fmt: skip
    whole = simulate(config, 8, IMAGES)
    monkeypatch.setattr(simulation, "REPLICAS", 4)
    short = usage_of(config, 8, IMAGES, 0, simulate_shallow)
    for name in ("parameters", "batches", "graphs"):
        assert getattr(short, name) == pytest.approx(getattr(whole, name), rel=0.01), name
    assert short.peak == pytest.approx(whole.peak, rel=0.1), "buckets of gradients are not linear in the blocks"
