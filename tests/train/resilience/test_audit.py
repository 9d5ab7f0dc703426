"""audit.jsonl: no line is lost with one that was cut off."""

from __future__ import annotations

import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from audit_lines import read_audit

from megatron_lcl.data.loading import ledger as ledger_module
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.train.loop import Training
from megatron_lcl.train.resilience.audit import AUDIT, Audit


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands in for a disk that is full in the middle of a line."""
    audit, limits = Audit(tmp_path, True), resource.getrlimit(resource.RLIMIT_FSIZE)
    audit.write("stopped", 1, signal=15)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / AUDIT).stat().st_size + 20, limits[1]))
        audit.write("rewind", 2, to=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "could not be written" in capsys.readouterr().out
    audit.write("not copied", 3, reason="none")
    audit.write("stopped", 4, signal=15)
    found = [(line["event"], line["step"]) for line in read_audit(tmp_path)]
    assert found == [("stopped", 1), ("not copied", 3), ("stopped", 4)]
    assert len((tmp_path / AUDIT).read_text().splitlines()) == 4


def test_the_packs_of_a_skipped_step_are_ranges(tmp_path: Path) -> None:
    """As many as they are; after rewinds they are not all in one row."""
    skipped = [{"from_pack": first, "skip": 100, "plan": {}} for first in range(3_000, 30_000, 2_000)]
    ledger, training = Ledger({}, tuple(skipped)), mock.MagicMock()
    training.ledger, training.audit, training.bad.too_many = ledger, Audit(tmp_path, True), False
    training.bad.record.return_value = "loss is nan"
    step: Any = SimpleNamespace(number=3, packs=20_000, global_batch=8_192, lr=1e-3, scale=None)
    with mock.patch.object(ledger_module, "sorted", create=True, side_effect=sorted) as sorting:
        Training._record(training, [(step, None)])
    assert sorting.call_count <= 2, "of all entries, and not for each pack"
    assert (tmp_path / AUDIT).stat().st_size < 1_000
    (line,) = read_audit(tmp_path)
    numbers = [number for first, stop in line["packs"] for number in range(first, stop)]
    assert numbers == [ledger.locate(20_000 + i) for i in range(8_192)]
    assert (line["event"], line["step"], line["reason"]) == ("step skipped", 4, "loss is nan")
