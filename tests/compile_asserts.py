"""Compiles the test files as pytest does, with asserts that explain themselves, once: the tests' processes, which begin
at the same time, would each do it.

Run by `launch/test.sh`. pytest keeps the results beside the code.
"""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

import pytest

TESTS = Path(__file__).parent


class Compiling:
    """Instead of collecting tests."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool:
        loader = session.config.pluginmanager.rewrite_hook
        # its modules are compiled and kept, and not run
        with mock.patch("_pytest.assertion.rewrite.exec", create=True):
            for file in [*TESTS.rglob("test_*.py"), *TESTS.rglob("conftest.py")]:
                spec = spec_from_file_location(file.stem, file, loader=loader)
                assert spec is not None
                loader.exec_module(module_from_spec(spec))
        return True


if __name__ == "__main__":
    code = pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "--no-summary", str(TESTS)], plugins=[Compiling()])
    raise SystemExit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code)
