"""How a benchmark ends: claims that do not hold are named last, with exit code 1; what a user can mend is said in one
line, with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from megatron_lcl.errors import UserError, complain, describe_os_error, is_mendable


def exit_unless(claims: Mapping[str, bool]) -> None:
    """Exit code 1 if a claim does not hold, which is named."""
    if failed := [claim for claim, holds in claims.items() if not holds]:
        sys.exit("claims that do not hold: " + "; ".join(failed))


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Exit code of `main`. One line and exit code 2 where it meets what a user can mend: an error of the kinds that the
    commands take for such (`is_mendable`), or a library that is not installed. Other errors keep their traceback."""
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "megatron_lcl":
            raise
        said = f'{error}: pip install -e ".[dev,benchmarks]" installs most of what is compared with'
    except (UserError, OSError) as error:
        if not is_mendable(error):
            raise
        said = describe_os_error(error) if isinstance(error, OSError) else str(error)
    complain(f"{Path(sys.argv[0]).name}: {' '.join(said.split())}")
    sys.exit(2)


def flat(name: str, found: Mapping[int, tuple[float, float]]) -> dict[str, bool]:
    """The claims that a cost is linear: `found` has documents a second and MiB at the peak by the number of documents.

    From each number to the next larger one the rate falls by at most a quarter, as much as it varies from run to run on
    a machine with other work, and the peak grows by at most 100 MiB.
    """
    claims = {}
    for less, more in zip(sorted(found), sorted(found)[1:], strict=False):
        between = f"from {less:,} to {more:,} documents"
        claims[f"{name}, {between}: at least 0.75 of the rate"] = found[more][0] >= 0.75 * found[less][0]
        claims[f"{name}, {between}: at most 100 MiB more"] = found[more][1] <= found[less][1] + 100
    return claims
