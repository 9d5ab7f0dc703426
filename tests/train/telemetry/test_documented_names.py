"""docs/metrics.md and the program name the same metrics."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from megatron_lcl import objectives
from megatron_lcl.data.loading.summary import Summary
from megatron_lcl.model.layers import PARTS
from megatron_lcl.objectives.base import COUNTS, OF_THE_RUN, is_of_the_run
from megatron_lcl.train import telemetry
from megatron_lcl.train.telemetry import health
from megatron_lcl.train.telemetry.stragglers import LISTED, QUANTILES

PAGE = Path(__file__).parents[3] / "docs/metrics.md"
EVALUATIONS = {"heldout/*", "labeled/*"}


def documented(section: str) -> set[str]:
    """Names in the first column of a section's table."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    return {name for line in text.splitlines() if line.startswith("| `") for name in _names(line)}


def _names(line: str) -> list[str]:
    return re.findall(r"`([^`]+)`", line.split("|")[1])


def written() -> set[str]:
    """Keys of the lines that the package writes, as its source has them; what is computed, from where it is."""
    found: set[str] = set()
    root = Path(telemetry.__file__).parents[1]
    for name in ("telemetry/log.py", "telemetry/meter.py", "checkpoint/saver.py", "kernels.py", "loop.py"):
        for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                found |= {
                    key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
                }
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.slice, ast.Constant)
            ):
                found.add(str(node.slice.value))
    return found


def test_the_page_and_the_program_name_the_same() -> None:
    of_objectives = {name for one in objectives.names() for name in objectives.objective_class(one).metrics}
    by_part = {f"{kind}/{part}" for kind in ("grad_norm", "update_norm", "lr") for part in PARTS}
    by_part |= {f"max_attention_logit/{part}" for part in PARTS if part != "head"}
    computed = {"loss", "log_scale", "grad_norm", *of_objectives, *COUNTS, *by_part, *health.NAMES}
    computed |= Summary(4, False, 1, 1, 1, 1, 0, 0).numbers().keys()
    page = documented("Every logged step") | documented("Other lines")
    assert computed <= page, computed - page
    keys = written()
    named = keys & page
    assert page - computed - named == EVALUATIONS, "the page names what nobody writes"
    internal = {"metric", "says", "grad_norm", "update_norm", "settings", "warnings", "missing", "unused"}
    internal |= {"max_attention_logit"}
    assert keys - page - internal == set(), "the program writes what the page does not name"


def test_no_term_may_give_what_a_run_writes_itself() -> None:
    of_objectives = {name for one in objectives.names() for name in objectives.objective_class(one).metrics}
    page = documented("Every logged step") | documented("Other lines")
    # what a term measures over the whole batch stands in place of health's number of a sample
    own = page - of_objectives - {*health.NAMES}
    assert {name for name in own | of_objectives | {*health.NAMES} if is_of_the_run(name)} == own
    assert own >= OF_THE_RUN
    assert not is_of_the_run("mine/loss")


def test_the_page_says_when_processes_are_listed() -> None:
    (row,) = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if "| `rank_step_seconds`" in line)
    assert f"of up to {LISTED} processes; of more {', '.join(f'`{name}`' for name in QUANTILES)} over them" in row


def test_the_page_has_the_bounds_of_health() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## Health\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    page = {name: row[2].strip().replace("−", "-") for row in rows for name in re.findall("`([\\w/]+)`", row[1])}
    assert page == {
        name: f"{'below' if bound.below else 'above'} {bound.value:g}" for name, bound in health.BOUNDS.items()
    }
