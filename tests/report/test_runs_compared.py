"""Which runs are one curve of the report, and what the page says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report.conftest import write_lines

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.report.charts import BOTTOM, HEIGHT, TOP
from megatron_lcl.report.page import changed_settings, settings_of
from megatron_lcl.report.runs import Group, Run, RunsPage, _lines, find_runs, group, write_runs_report
from megatron_lcl.report.series import Metrics


def run_of(tree: dict[str, Any]) -> Run:
    return Run(Path("run"), settings_of(configs.from_dict(tree)), Metrics(run=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"seed": 1}},
        {"train": {"output": "elsewhere", "log_every": 3}},
        {"data": {"seed": 1, "workers": 3, "look_ahead": 5, "cache": "c", "storage_cache_gb": 2.0}},
        {"checkpoint": {"every": 7}},
        {"guard": {"every": 7, "timeout": 99.0}},
    ],
)
def test_what_changes_no_result_makes_no_other_curve(tree: dict[str, Any]) -> None:
    (one,) = group([run_of({}), run_of(tree)])
    assert len(one.runs) == 2


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr"),
        ({"guard": {"spike_sigmas": 6.0}}, "guard.spike_sigmas"),
        ({"guard": {"spike_window": 64}}, "guard.spike_window"),
        ({"train": {"global_batch": 1024}}, "train.global_batch"),
        ({"deepspeed": {"fp16": {"hysteresis": 1}}}, "deepspeed.fp16.hysteresis"),
    ],
)
def test_what_changes_the_result_does(tree: dict[str, Any], name: str) -> None:
    one, other = group([run_of({}), run_of(tree)])
    assert list(one.shown) == list(other.shown) == [name]


@pytest.mark.parametrize(
    ("objective", "given", "differs"),
    [
        ("lcl", {"regression_weight": 1.0}, False),  # as earlier versions wrote
        ("clip", {"contrastive_weight": 0.5}, False),
        ("lcl", {"contrastive_weight": 0.1, "generation_weight": 1.0}, False),
        ("emu", {"regression_weight": 1.0}, False),
        ("emu", {"regression_weight": 2.0}, True),
        ("lcl", {"contrastive_weight": 1.0}, True),
        ("of a package that is not installed", {"contrastive_weight": 1.0}, True),
    ],
)
def test_weights_are_compared_as_they_count(objective: str, given: dict[str, float], differs: bool) -> None:
    """What the objective does not read, or publishes itself, is no difference."""
    config = {"objective": {"name": objective, **given}}
    groups = group([run_of({"objective": {"name": objective}}), run_of(config)])
    shown = [f"objective.{name}" for name in given] if differs else []
    assert [list(of_one.shown) for of_one in groups] == [shown] * (1 + differs)
    changed = [name for name, *_ in changed_settings(configs.from_dict(config)) if name.endswith("_weight")]
    assert changed == shown


def test_what_any_run_has_written_is_taken_in_at_once(tmp_path: Path) -> None:
    """And a run that has begun."""
    folders = [write_lines(tmp_path / f"s/{n}", [{"step": 1, "loss": 1.0}], n) for n in range(2)]
    page = RunsPage([tmp_path / "s"])
    for folder in folders:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "loss": 1.0}\n')
    assert [page.changed(), page.changed()] == [True, False]
    write_lines(tmp_path / "s/2", [], 2)
    assert [page.changed(), page.changed()] == [True, False]


def test_groups_stand_in_the_order_of_what_differs() -> None:
    """Numbers by their size, before what is none."""
    groups = group([run_of({"model": {"vision": {"layer_scale": value}}}) for value in (None, 0.1, 1e-5, 0.02)])
    assert [of_one.shown["model.vision.layer_scale"] for of_one in groups] == [1e-5, 0.02, 0.1, None]


def test_shares_are_in_percent_beside_chance(tmp_path: Path) -> None:
    """A level is drawn where it is the same for all groups; a cell says its own."""
    for n, pairs in enumerate((50, 80)):
        name = "heldout/image_to_context_recall_at_1"
        lines = [
            {"step": s, f"{name}0": 0.3 + s / 100, "heldout/chance_at_10": 0.2, name: 0.1 * s, "loss": 1.0 * s,
             "heldout/chance_at_1": 1 / pairs}
            for s in range(1, 5)
        ]  # fmt: skip
        write_lines(tmp_path / f"s/{n}", lines, n)
    page = write_runs_report([tmp_path / "s"]).read_text()
    figures = dict(re.findall(r"<figcaption><b>(.*?)</b>(.*?)</figure>", page, re.DOTALL))
    ten = figures["held-out recall@10 (%): image to context"]
    assert re.findall(r'class="line (\w+)" data-label="([^"]*)"', ten) == [
        ("k0", "lr 1"), ("k1", "lr 2"), ("quiet", "chance")
    ]  # fmt: skip
    assert re.search(r'<p class="key">.*chance</span></p>', ten)
    one = figures["held-out recall@1 (%): image to context"]
    assert re.findall(r'class="line (\w+)"', one) == ["k0", "k1"]
    cells = [
        group([Run.of(run)])[0].cell("heldout/image_to_context_recall_at_1") for run in find_runs([tmp_path / "s"])
    ]
    assert cells == [["40\u00a0%", "chance 2\u00a0%"], ["40\u00a0%", "chance 1.25\u00a0%"]]
    of_both = Group([Run.of(run) for run in find_runs([tmp_path / "s"])], 0, {})
    assert of_both.cell("heldout/image_to_context_recall_at_1")[-1] == "chance 1.25 to 2\u00a0%"
    differences, runs = page.split('<section id="runs">')
    assert '<td class="number">34\u00a0% <span class="quiet">chance 20\u00a0%</span></td>' in differences
    assert runs.count('<td class="number">34\u00a0%</td>') == 2
    assert re.findall(r"</svg>([^<]*)</td><td [^>]*>(\w)<", runs) == [("lr 1", "0"), ("lr 2", "1")], (
        "whose line is which"
    )


@pytest.mark.parametrize(("of_its_own", "drawn"), [({"heldout/context_to_image_chance_at_10": 0.4}, 40), ({}, 20)])
def test_each_way_of_retrieval_has_its_chance(tmp_path: Path, of_its_own: dict[str, float], drawn: int) -> None:
    """In runs by earlier rules both have one."""
    name = "heldout/context_to_image_recall_at_10"
    line = {name: 0.5, name.replace("context_to_image", "image_to_context"): 0.5, "heldout/chance_at_10": 0.2}
    for n in range(2):
        write_lines(tmp_path / f"s/{n}", [{"step": s, "loss": 1.0, **line, **of_its_own} for s in (1, 2)], n)
    page = write_runs_report([tmp_path / "s"]).read_text()
    figures = dict(re.findall(r"<figcaption><b>(.*?)</b>(.*?)</figure>", page, re.DOTALL))
    for way, level in (("image to context", 20), ("context to image", drawn)):
        figure = figures[f"held-out recall@10 (%): {way}"]
        (bounds,) = re.findall(r'data-range="([^"]*)"', figure)
        *_, low, high = map(float, bounds.split())
        ((label, y),) = re.findall(r'class="line quiet" data-label="([^"]*)"[^>]* d="M\S+ ([\d.]+)', figure)
        share = (HEIGHT - BOTTOM - float(y)) / (HEIGHT - BOTTOM - TOP)
        assert (label, low + share * (high - low)) == ("chance", pytest.approx(level, abs=0.1))
    (_, cell) = group([Run.of(tmp_path / "s/0")])[0].cell(name)
    assert cell == f"chance {drawn}\u00a0%"


@pytest.mark.parametrize("lines", [[(1, 0.2), (2, 0.2)], [(3, 0.2), (4, 0.2)], [(3, 0.1), (4, 0.1)], []])
def test_a_level_that_not_all_runs_have_is_not_drawn(tmp_path: Path, lines: list[tuple[int, float]]) -> None:
    """Nor one that is another where they have no step in common."""
    name, level = "heldout/image_to_context_recall_at_10", "heldout/chance_at_10"
    for n, of_one in enumerate(([(1, 0.2), (2, 0.2)], lines)):
        steps = [{"step": step, name: 0.5, level: chance} for step, chance in of_one] or [{"step": 1, name: 0.5}]
        write_lines(tmp_path / f"s/{n}", [{"loss": 1.0, **line} for line in steps], n)
    write_lines(tmp_path / "s/not measured", [{"loss": 1.0, "step": step} for step in (1, 2)], 2)
    page = write_runs_report([tmp_path / "s"]).read_text()
    assert ('data-label="chance"' in page) == (0.2 in dict(lines).values())


def test_the_mean_of_runs_is_drawn_in_the_unit_of_their_band() -> None:
    runs = [run_of({"train": {"seed": seed}}) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        for step in (1, 2):
            run.metrics._take({"step": step, "mfu": 0.25 * step + 0.5 * seed})
    (line,) = _lines(group(runs), "mfu", 100.0)
    assert line.mean is not None
    assert (line.low.tolist(), line.mean.tolist(), line.high.tolist()) == ([25, 50], [50, 75], [75, 100])


@pytest.mark.parametrize(("step", "expected"), [(4, 9.0), (5, 7.0), (6, 7.0), (None, 7.0)])
def test_a_held_out_result_of_the_last_measured_step_or_a_later_one_counts(
    tmp_path: Path, step: int | None, expected: float
) -> None:
    write_lines(tmp_path / "run", [{"step": 5, "heldout/median_rank": 9.0}])
    (tmp_path / "run/heldout.json").write_text(json.dumps({"median_rank": 7.0, "step": step}))
    assert Run.of(tmp_path / "run").last("heldout/median_rank") == expected


def evaluated(folder: Path, *versions: int | None, n: int = 0, **result: Any) -> Path:
    """A run with a held-out number by each of these versions of the rules; result: what `evaluate` wrote there."""
    name = "heldout/image_to_context_recall_at_10"
    lines = [
        {"step": step, name: step / 10, "heldout/chance_at_10": 0.1, "heldout/rules": version}
        for step, version in enumerate(versions, 1)
    ]
    lines = [{key: value for key, value in line.items() if value is not None} for line in lines]
    write_lines(folder, [*lines, {"step": 9, "loss": 1.0}], **{"train.seed": str(n)})
    if result:
        (folder / "heldout.json").write_text(json.dumps(result))
    return folder


def test_numbers_by_other_rules_are_another_line(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / f"s/{n}", *of, n=n) for n, of in enumerate(((3, 3), (2, 2), (3, 3), (), (2, 3)))]
    groups = group([*map(Run.of, runs)])
    assert [(of_one.label, [run.folder.name for run in of_one.runs]) for of_one in groups] == [
        ("held-out rules version 2", ["1"]),
        ("held-out rules version 2, then version 3", ["4"]),
        ("held-out rules version 3", ["0", "2", "3"]),  # the last one is not evaluated yet
    ]
    (one,) = group([Run.of(runs[n]) for n in (0, 2, 3)])
    assert not one.shown
    other = Run.of(write_lines(tmp_path / "s/other", [{"step": 1, "loss": 1.0}], 1))  # not evaluated is no other rule
    assert {key for of_one in group([Run.of(runs[0]), other]) for key in of_one.shown} == {"optimizer.lr"}


@pytest.mark.parametrize(
    ("versions", "step", "rules", "said"),
    [
        ((), 5, {"version": 2}, "version 2"),
        ((3,), None, {"version": 4}, "version 3, then version 4"),
        ((3, 3), 1, {"version": 2}, "version 3"),  # of an earlier step than the last line
        ((3, 3), 2, {"version": 3}, "version 3"),
        ((None,), 1, {"version": 2}, "version 2"),  # as the run itself wrote it
        ((None,), 1, {"version": 3}, "an unrecorded version, then version 3"),  # as a later release did
        ((None,), 1, {}, "an unrecorded version"),
    ],
)
def test_the_rules_of_a_result_count_as_its_numbers_do(
    tmp_path: Path, versions: tuple[int | None, ...], step: int | None, rules: dict[str, int], said: str
) -> None:
    run = evaluated(tmp_path / "run", *versions, step=step, rules=rules)
    assert Run.of(run).rules == said


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for n, name in enumerate(("a/run", "b/run", "c/other")):
        write_lines(tmp_path / name, [{"step": 1, "loss": 1.0}], n)
    for folder in (tmp_path, tmp_path / "a" / ".." / "c" / ".."):  # a path through others is in none of them
        page = write_runs_report([tmp_path / "a", folder / "b", folder / "c"], tmp_path / "page.html").read_text()
        assert re.findall(r'<td class="whole">([^<]*)</td>', page) == ["a/run", "b/run", "other"]


def test_the_page_lies_in_the_folder_that_all_runs_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, name in enumerate(("here/A", "there/B")):
        write_lines(tmp_path / name, [{"step": 1, "loss": 1.0}], n)
    monkeypatch.chdir(tmp_path / "here")
    assert write_runs_report([Path("A"), Path("../there/B")]) == tmp_path / "report.html"


def test_runs_further_down_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder of runs the page is about those directly in it."""
    for n, name in enumerate(("runs/one", "runs/sweep/seed=0", "runs/sweep/seed=1")):
        write_lines(tmp_path / name, [{"step": 1, "loss": 1.0}], n)
    (tmp_path / "runs" / "other" / "folder").mkdir(parents=True)
    sweep = tmp_path / "runs" / "sweep"
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "page.html")]) == 0
    said = f"megatron-lcl: the runs in {sweep} are not on the page; for theirs: megatron-lcl report {sweep}\n"
    assert capsys.readouterr().err == said
    for more in ([], [str(tmp_path / "runs")]):
        assert main(["report", str(sweep), *more, "--output", str(tmp_path / "page.html")]) == 0
        assert capsys.readouterr().err == ""
