"""The partition of layers into stages against all partitions."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline_layouts import Case, micro_batch

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.model.layers import num_layers, parameter_shapes
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train import first_batch
from megatron_lcl.train.checkpoint.folder import Layout, Progress
from megatron_lcl.train.engine import specs_of
from megatron_lcl.train.parts import frozen_parameters
from megatron_lcl.train.pipeline import partition
from megatron_lcl.train.pipeline.partition import LayerSamples, partition_balanced, partition_uniform, stage_sums


def by_trying_all(
    costs: list[int],
    sizes: list[int],
    num_stages: int,
    in_first: list[int] | None = None,
    trained: list[frozenset[bool]] | None = None,
) -> tuple[int, ...]:
    every = [(0, *rest) for rest in itertools.combinations(range(1, len(costs)), num_stages - 1)]
    if trained:
        kinds = set().union(*trained)
        stages = [[set().union(*trained[a:b]) for a, b in itertools.pairwise([*f, len(costs)])] for f in every]
        every = [first for first, of in zip(every, stages, strict=True) if all(k == kinds for k in of)] or every

    def slowest(first: tuple[int, ...]) -> float:
        return max(stage_sums(in_first or costs, first)[:1] + stage_sums(costs, first)[1:])

    return min(every, key=lambda first: (slowest(first), sum(sizes[i] for i in first[1:]), first))


@given(
    layers=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=9),
    num_stages=st.integers(1, 9),
)
def test_no_partition_is_better(layers: list[tuple[int, int]], num_stages: int) -> None:
    """Small numbers: many ties, which fewer bytes decide, then earlier boundaries."""
    num_stages = min(num_stages, len(layers))
    costs, sizes = (list(column) for column in zip(*layers, strict=True))
    assert partition_balanced(costs, sizes, num_stages) == by_trying_all(costs, sizes, num_stages)


COST, SIZE = st.integers(0, 6), st.integers(0, 3)


@given(
    layers=st.lists(st.tuples(COST, SIZE, COST, st.frozensets(st.booleans())), min_size=1, max_size=9),
    num_stages=st.integers(1, 9),
)
def test_no_partition_is_better_where_something_is_frozen(layers: list[Any], num_stages: int) -> None:
    """Other costs in the first stage; in each stage something to train of all kinds, if there is such a partition."""
    num_stages = min(num_stages, len(layers))
    costs, sizes, in_first, trained = (list(column) for column in zip(*layers, strict=True))
    found = partition_balanced(costs, sizes, num_stages, in_first, trained)
    assert found == by_trying_all(costs, sizes, num_stages, in_first, trained)


def test_a_frozen_tower_is_in_a_stage_with_something_to_train() -> None:
    config = configs.replace(Case((0,), (((1, 2),),)).config, model__vision__layers=9, train__freeze=("vision.*",))
    costs = [1.0] * num_layers(config.model)
    for num_stages in (2, 3):
        assert partition_balanced(costs, costs, num_stages)[1] < 11
        bounds = [*partition_uniform(configs.replace(config, parallel__pipeline=num_stages)), len(costs)]
        assert bounds[1] >= 11  # patches and nine blocks, and the pool
        named = dict(parameter_shapes(config.model))
        frozen = frozen_parameters(config)
        for first, after in itertools.pairwise(bounds):
            own = [
                shape
                for name, shape in named.items()
                if first <= int(name.split(".")[0]) < after and name not in frozen
            ]
            assert {len(shape) >= 2 for shape in own} == {True, False}


def test_a_partition_is_kept_while_the_same_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_batch, "choose_partition", lambda *_: (0, 5))
    monkeypatch.setattr(first_batch, "sample_batch", lambda *_: None)
    frozen = ("vision.*", "head.log_scale")
    config = configs.replace(Case((0,), (((1, 2),),)).config, train__freeze=frozen)

    def begin(stages: int, layout: Layout) -> tuple[int, ...]:
        mesh = SimpleNamespace(pipeline=SimpleNamespace(size=stages), tensor=Axis())
        point = SimpleNamespace(progress=Progress(1, 4, {}, layout=layout))
        return first_batch.pipeline_partition(config, mesh, point)  # type: ignore[arg-type]

    assert begin(2, Layout(pipeline=2, partition=(0, 3), frozen=frozen[::-1])) == (0, 3)
    assert begin(2, Layout(pipeline=2, partition=(0, 3), frozen=("vision.*",))) == (0, 5)
    assert begin(2, Layout(pipeline=2, partition=(0, 3))) == (0, 5)
    assert begin(2, Layout(frozen=frozen)) == begin(2, Layout()) == (0, 5)
    assert begin(1, Layout()) == begin(1, Layout(pipeline=2, partition=(0, 3), frozen=frozen)) == (0,)


@given(costs=st.lists(st.floats(1e-6, 10), min_size=4, max_size=9), num_stages=st.integers(1, 4))
def test_no_slowest_stage_is_faster(costs: list[float], num_stages: int) -> None:
    sizes = [0] * len(costs)
    ours, best = (f(costs, sizes, num_stages) for f in (partition_balanced, by_trying_all))  # type: ignore[operator]
    assert max(stage_sums(costs, ours)) == max(stage_sums(costs, best))


def test_examples() -> None:
    assert partition_balanced([3, 1, 1, 1, 3], [9, 9, 9, 9, 9], 3) == (0, 1, 4)
    # fewer bytes never make the slowest stage slower
    assert partition_balanced([1, 1, 1, 1], [9, 9, 9, 1], 2) == (0, 2)
    assert partition_balanced([1, 0, 0, 1], [9, 2, 1, 1], 2) == (0, 2)
    with pytest.raises(ValueError, match=r"2 layers do not divide into 3 stages; set parallel\.pipeline to 2"):
        partition_balanced([1, 1], [1, 1], 3)


def test_stages_of_equally_many_layers() -> None:
    deep = {"model__vision__layers": 20, "model__language__layers": 4}
    assert partition_uniform(configs.replace(Config(), **deep, parallel__pipeline=4)) == (0, 6, 13, 20)


def test_each_kind_of_stage_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts calls: which kinds there are, and what a layer's time is made of."""
    ticks = itertools.count()
    monkeypatch.setattr(partition, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks) ** 2)))
    case = Case((0,), (((1, 2),),), checkpointing="full")
    config = configs.replace(case.config, train__activation_checkpointing_every=2, model__vision__layers=4)
    batch = micro_batch((1, 2), config, torch.Generator().manual_seed(0))
    samples = LayerSamples(specs_of(config, Axis()), batch, config, Axis(), torch.device("cpu"), torch.float32)
    times = samples.times([samples.measure() for _ in range(3)])
    assert len(times) == 10
    assert times[1] == times[3] != times[2] == times[4]  # every second block computes its forward twice
    assert times[6] == times[8] != times[7]
    assert len(set(times)) == 7
    assert times[0].of_step(recompute=False) == times[0].forward + times[0].backward
    assert times[0].of_step(recompute=True) == times[0].forward + times[0].backward + times[0].plain


def test_what_is_frozen_takes_no_backward_in_the_first_stage() -> None:
    """Below the lowest part that is trained. Another stage computes the gradient of the rows that it receives."""
    frozen = ("vision.*",)
    config = configs.replace(Case((0,), (((1, 2),),)).config, model__vision__layers=3, train__freeze=frozen)
    batch, every = micro_batch((1, 2), config, torch.Generator().manual_seed(0)), specs_of(config, Axis())
    samples = LayerSamples(every, batch, config, Axis(), torch.device("cpu"), torch.float32)
    measured = [samples.measure()]
    first, others = samples.times(measured, in_first=True), samples.times(measured)
    pool = 1 + config.model.vision.layers
    assert [time.backward == 0 for time in first] == [index < pool for index in range(len(every))]
    assert [time.backward == 0 for time in others] == [index == 0 for index in range(len(every))]
    assert first[pool] != others[pool]  # of the rows that it receives it computes no gradient
    assert first[pool + 1 :] == others[pool + 1 :]
    thawed = configs.replace(config, train__freeze=())
    samples = LayerSamples(every, batch, thawed, Axis(), torch.device("cpu"), torch.float32)
    measured = [samples.measure()]
    assert samples.times(measured, in_first=True) == samples.times(measured)
