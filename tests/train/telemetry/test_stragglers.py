"""Who is named as the slowest."""

from __future__ import annotations

from megatron_lcl.train.telemetry.clock import PHASES, STEP, WORK
from megatron_lcl.train.telemetry.devices import PEAKS, peak_of
from megatron_lcl.train.telemetry.stragglers import (
    DRAWN,
    LISTED,
    QUANTILES,
    Place,
    Stragglers,
    of_each,
    over_ranks,
    slowest,
)


def times(**phases: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | phases


def test_it_is_the_one_with_more_work_not_the_one_that_waits() -> None:
    places = [Place("a", 0), Place("a", 0), Place("b", 0)]
    found = slowest([times(forward=1.0, reduce=5.0), times(forward=1.1, reduce=4.9), times(forward=3.0)], places)
    assert (found.rank, found.lag, found.phase) == (2, 3.0 - 1.1, "forward")


def test_processes_are_compared_with_those_at_the_same_place_of_their_replica() -> None:
    """In a pipeline the first stage may well take longer than the last."""
    places = [Place("a", 0), Place("a", 1), Place("b", 0), Place("b", 1)]
    found = slowest([times(forward=9.0), times(forward=1.0), times(forward=9.0), times(forward=1.5)], places)
    assert (found.rank, found.lag) == (3, 0.5)
    alone = slowest([times(data=1.0), times(forward=4.0)], [Place("a", 0), Place("a", 1)])
    assert (alone.rank, alone.phase) == (1, "forward")


def test_it_is_said_once_it_lasts_and_counted_by_node() -> None:
    stragglers = Stragglers([Place("a", 0), Place("b", 0)])
    slow, even = [times(backward=1.0), times(backward=1.5)], [times(data=1.02), times(data=1.0)]
    said = [stragglers.add(each, 2.0)[1] for each in (slow, slow, even, slow, slow, slow, slow)]
    assert [line is not None for line in said] == [False] * 5 + [True, False]
    assert said[5] == ("process 1 (node b) is behind the others by 0.5 s a step, in backward: last in 5 of 6 lines")
    assert stragglers.by_node() == {"b": 6, "a": 1}
    first, second = stragglers.report()
    assert (first["rank"], first["last"], first["of"], first["phase"]) == (1, 6, 7, "backward")
    assert abs(first["lag_seconds"] - 0.5) < 1e-9  # type: ignore[operator]
    assert (second["node"], second["last"]) == ("a", 1)


def test_each_process_has_its_time_and_many_have_quantiles() -> None:
    rows = [times(data=0.1, forward=1.23456, reduce=0.5, other=9.0), times(forward=2.0)]
    assert (of_each(rows, STEP), of_each(rows, WORK)) == ([1.835, 2.0], [1.335, 2.0])
    many = [times(backward=float(rank)) for rank in reversed(range(4096))]
    assert of_each(many[-LISTED:], WORK) == [float(rank) for rank in reversed(range(LISTED))]
    found = of_each(many, WORK)
    assert isinstance(found, dict)
    assert found == {"min": 0, "p10": 410, "median": 2048, "p90": 3686, "max": 4095}
    assert list(found) == list(QUANTILES)


def test_what_is_drawn_of_all_processes() -> None:
    """The same of a list as of quantiles."""
    rows = [times(backward=float(rank)) for rank in range(LISTED + 1)]
    few, many = ({"rank_step_seconds": of_each(some, STEP), "loss": 1.0} for some in (rows[:-1], rows))
    assert over_ranks(few) == {f"rank_step_seconds/{n}": v for n, v in zip(DRAWN, (0, 32, 63), strict=True)}
    assert over_ranks(many) == {f"rank_step_seconds/{n}": v for n, v in zip(DRAWN, (0, 32, 64), strict=True)}
    assert over_ranks({"loss": 1.0, "rank_work_seconds": []}) == {}, "one process alone"


def test_peaks_are_found_by_the_names_that_drivers_give() -> None:
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"):
        assert peak_of(name, "bfloat16") == 312e12
    assert peak_of("NVIDIA H100 80GB HBM3", "bfloat16") == 989.5e12
    assert peak_of("NVIDIA H100 PCIe", "float16") == 756e12
    assert peak_of("NVIDIA H100 NVL", "float32") == 60e12
    assert peak_of("NVIDIA B200", "bfloat16") == 2250e12
    assert peak_of("AMD Instinct MI300X", "float32") == 163.4e12
    assert peak_of("NVIDIA L40S", "bfloat16") == 362e12
    assert peak_of("NVIDIA RTX A6000", "bfloat16") == 154.8e12
    assert peak_of("NVIDIA GeForce RTX 4090", "bfloat16") == 165.2e12
    assert peak_of("NVIDIA GeForce RTX 3090", "float32") == 35.6e12
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti"):
        assert peak_of(other, "bfloat16") is None, other
    for other in ("Some other card", "NVIDIA RTX A1000", "NVIDIA GB200", "NVIDIA GH200 480GB", "NVIDIA A100X"):
        assert peak_of(other, "bfloat16") is None, other
    assert peak_of("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16") is None, "a seventh of it"
    for words, peak in PEAKS.items():
        assert peak_of(" ".join(words), "bfloat16") == peak.half, "none hides another"
