"""Types and checks that the sections of the config share."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from megatron_lcl.errors import UserError

STRICT = ConfigDict(
    extra="forbid",
    validate_default=True,
    allow_inf_nan=False,
    ser_json_inf_nan="constants",  # what has no type may hold them, as `deepspeed` does, and null says something else
)
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


def divides(small: str, divisor: int, large: str, value: int) -> None:
    if value % divisor:
        below = next(d for d in range(min(divisor, value), 0, -1) if value % d == 0)
        raise UserError(
            f"{small} = {divisor} does not divide {large} = {value}; the nearest smaller value that does is {below}"
        )
