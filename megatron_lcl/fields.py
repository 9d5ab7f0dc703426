"""What stands in a tree of pydantic dataclasses: names, types, defaults and help of its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic.fields import FieldInfo


def describe(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every field below `cls` as (dotted name, type, default, help), in order."""
    for name, info in fields_of(cls).items():
        section = section_of(info)
        if section is not None:
            yield from describe(section, f"{prefix}{name}.")
        else:
            default = info.get_default(call_default_factory=True) if not info.is_required() else "(required)"
            yield f"{prefix}{name}", _type_name(info.annotation), _plain_text(default), info.description or ""


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The fields by name."""
    return cls.__pydantic_fields__  # type: ignore[attr-defined]


def section_of(info: FieldInfo) -> type | None:
    """The dataclass that the field holds, if it holds one."""
    return info.annotation if isinstance(info.annotation, type) and dataclasses.is_dataclass(info.annotation) else None


def _type_name(annotation: Any) -> str:
    arguments = get_args(annotation)
    if getattr(annotation, "__origin__", None) is Literal:
        return "|".join(map(str, arguments))
    if arguments and type(None) in arguments:
        return "|".join(_type_name(a) for a in arguments if a is not type(None)) + "|null"
    if arguments and hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    if getattr(annotation, "__origin__", None) in (tuple, dict):
        return "list" if annotation.__origin__ is tuple else "mapping"
    return getattr(annotation, "__name__", str(annotation))


def _plain_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_plain_text(v) for v in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
