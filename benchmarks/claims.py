"""How a benchmark judges what it claims: claims that do not hold are named last, and the exit code is then 1."""

from __future__ import annotations

import sys
from collections.abc import Mapping


def exit_unless(claims: Mapping[str, bool]) -> None:
    """Exit code 1 if a claim does not hold, which is named."""
    if failed := [claim for claim, holds in claims.items() if not holds]:
        sys.exit("claims that do not hold: " + "; ".join(failed))


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
