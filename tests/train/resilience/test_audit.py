"""audit.jsonl: no line is lost with one that was cut off."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
from audit_lines import read_audit

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
