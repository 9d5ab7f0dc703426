"""What stands in a tree of pydantic dataclasses: names, types, defaults and help of its fields; values from text.

The type decides what a text means (`convert`), not YAML's guesses: `0123` is a folder's name where a name is wanted,
and 123 where a number is. `put` and `build` make a tree of texts; what does not fit is a `UserError` that names the key
and the nearest real one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from megatron_lcl.errors import UserError

_MAX_REPEATED = 100_000
"""characters, and lists and mappings, that aliases of a YAML text may stand for: of ten lines, each with ten aliases of
the one before, they would be 10^10"""
_SHOWN = 200
"""characters of a value that an error message shows"""
_FAULTS = 20
"""that an error message names"""
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def describe(cls: type, prefix: str = "", items: bool = False) -> Iterator[tuple[str, str, str, str]]:
    """Every field below `cls` as (dotted name, type, default, help), in order.

    items: behind a list of sections also the fields of each, as `data.corpora[].path`.
    """
    for name, info in fields_of(cls).items():
        section = section_of(info)
        if section is not None:
            yield from describe(section, f"{prefix}{name}.", items)
            continue
        default = info.get_default(call_default_factory=True) if not info.is_required() else "(required)"
        yield f"{prefix}{name}", _type_name(info.annotation), plain_text(default), info.description or ""
        item = (get_args(info.annotation) or (None,))[0]
        if items and dataclasses.is_dataclass(item) and isinstance(item, type):
            yield from describe(item, f"{prefix}{name}[].")


def fields_of(cls: Any) -> dict[str, FieldInfo]:
    """The fields by name."""
    return cls.__pydantic_fields__


def flat(tree: Mapping[Any, Any], prefix: str = "", lists: bool = False) -> dict[str, Any]:
    """The values of nested mappings by dotted name, in order; a mapping without values has none.

    lists: lists of mappings, such as the corpora, are taken apart as well, by number.
    """
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if lists and isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.", lists)
        else:
            values[f"{prefix}{name}"] = value
    return values


def annotation_of(cls: Any, dotted: str) -> Any:
    """The type of the field with a dotted name; None where there is no such field."""
    annotation: Any = cls
    for name in dotted.split("."):
        info = fields_of(annotation).get(name) if dataclasses.is_dataclass(annotation) else None
        if info is None:
            return None
        annotation = info.annotation
    return annotation


def parse(annotation: Any, text: str) -> Any:
    """What a text gives for a field of a type. Lists, mappings and sections are YAML, their parts again by type.

    Where no type is known (None, Any) YAML decides. A text that the type does not take comes back as it is, for whoever
    checks the value to name. Raises yaml.YAMLError.
    """
    if annotation is None or any(part is Any or Any in get_args(part) for part in _alternatives(annotation)):
        return read_yaml(text)
    is_part = text != "null" and not text.lstrip().startswith(("[", "- "))
    if is_part and any(map(_is_plain_list, _alternatives(annotation))):
        return convert(annotation, [text])  # the only part, which if it is text may have any character
    holders = [part for part in _alternatives(annotation) if _holds_others(part)]
    is_name = is_part and text.strip()[:1] not in ("", "{") and all(map(_is_list, holders))  # a corpus's path
    if holders:
        return convert(annotation, text.strip() if is_name else yaml.load(text, _TextLoader))  # scalars as written
    return convert(annotation, text)


def convert(annotation: Any, value: Any) -> Any:
    """A text, or lists and mappings of texts, as a type wants it; what it does not take comes back as it is."""
    kinds = _alternatives(annotation)
    if isinstance(value, list):
        return [convert(_part(kinds, number), part) for number, part in enumerate(value)]
    if isinstance(value, Mapping):
        section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        return {
            key: convert(annotation_of(section, key), part) if section and annotation_of(section, key) else part
            for key, part in value.items()
        }
    if not isinstance(value, str):
        return value
    if value == "null" and (types.NoneType in kinds or not kinds & {str, Any}):
        return None
    if bool in kinds and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if int in kinds and re.fullmatch(r"[-+]?[0-9](_?[0-9])*", value):
        return int(value)
    if float in kinds:
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def read_yaml(text: str) -> Any:
    """What YAML makes of a text. Raises yaml.YAMLError, also for a key that stands twice in a mapping, for aliases that
    stand for more than _MAX_REPEATED characters, and for one inside of what it stands for."""
    return yaml.load(text, _Loader)


def read_sections(file: str | Path, wanted: str) -> dict[str, Any]:
    """The mapping that a YAML file holds, {} of an empty one.

    wanted: what the file should hold, for the UserError where it holds something else. UserError also where there is
    no such file, or it is not YAML.
    """
    try:
        tree = read_yaml(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config file {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{file} holds a {type(tree).__name__}; {wanted}")
    return tree or {}


class _Checked(yaml.parser.Parser, yaml.composer.Composer):
    """Raises ConstructorError for a key that stands twice, of which PyYAML takes the last, and for aliases that stand
    for too much: they cost PyYAML nothing, but whoever walks through the values meets each of them.

    Before merges (`<<`), which put a mapping's own keys behind those it takes from others.
    """

    def compose_document(self) -> yaml.Node | None:
        self._sizes: dict[yaml.Node, int] = {}
        """of each node that is whole, with all inside it, its aliases written out"""
        self._size = self._repeated = 0
        return super().compose_document()

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self._size
        alias = event if isinstance(event, yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        assert node is not None
        if alias is None:
            self._size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            self._sizes[node] = self._size - before
            return node
        mark: Any = alias.start_mark
        if node not in self._sizes:
            problem = f"the alias *{alias.anchor} is inside of what it stands for"
            raise yaml.constructor.ConstructorError(None, None, problem, mark)
        self._size += self._sizes[node]
        self._repeated += self._sizes[node]
        if self._repeated > _MAX_REPEATED:
            problem = f"aliases stand for more than {_MAX_REPEATED:,} characters; write their values out"
            raise yaml.constructor.ConstructorError(None, None, problem, mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":  # of two merges none is lost
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key `{key.value}` stands twice in a mapping", key.start_mark
                    )
                seen.add(key.value)
        return node


class _TextLoader(_Checked, yaml.BaseLoader):
    """Every scalar is text."""


class _Loader(_Checked, yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, and 1e-3 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _alternatives(annotation: Any) -> set[Any]:
    """The types of a union, without what is annotated about them."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(_alternatives(part) for part in get_args(annotation)))
    return {annotation}


def _holds_others(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or _is_list(kind) or get_origin(kind) is dict


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (tuple, list, Iterable)


def _is_plain_list(kind: Any) -> bool:
    """Whether it is a list of any length, whose parts hold no others."""
    part, *more = get_args(kind) or (kind,)
    return get_origin(kind) is tuple and more == [Ellipsis] and not any(map(_holds_others, _alternatives(part)))


def _part(kinds: set[Any], number: int) -> Any:
    """The type of a list's part."""
    for kind in kinds:
        if _is_list(kind):
            arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
            return arguments[min(number, len(arguments) - 1)]
    return str


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


def plain_text(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return "[" + ", ".join(plain_text(v) for v in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# --- a tree of values --------------------------------------------------------------------------------------------


def put(cls: type, tree: dict[str, Any], key: str, text: str) -> None:
    """Set the field with a dotted name to what `parse` makes of a text. UserError where no section is there for it."""
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        child = node[section] = {} if node.get(section) is None else node[section]
        if not isinstance(child, dict):
            raise UserError(f"--{key}: {section} is not a section; {nearest(cls, key)}")
        node = child
    try:
        node[name] = parse(annotation_of(cls, key), text)
    except yaml.YAMLError:
        node[name] = text


def without_null(cls: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without what is null where that says the same as nothing: sections, and fields that are off (none,
    false or an empty list) by default."""
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        info = fields_of(cls).get(key)
        section = section_of(info) if info else None
        if value is not None:
            kept[key] = without_null(section, value) if section and isinstance(value, Mapping) else value
        elif not (
            section or (info and not info.is_required() and _is_off(info.get_default(call_default_factory=True)))
        ):
            kept[key] = value
    return kept


def _is_off(default: Any) -> bool:
    return default is None or default is False or default == ()


def _config_key(key: str) -> str:
    return f"config key `{key}`"


def build(cls: type, tree: Mapping[str, Any], called: Callable[[str], str] = _config_key) -> Any:
    """`cls` from nested dicts of plain values. UserError naming the keys that are not there or do not fit.

    called: what a key is called in it.
    """
    try:
        # strict as JSON is: a list does for a tuple and 1 for 1.0, but true for no number and 1 for no truth value
        return _adapter(cls).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        faults = error.errors()
        said = [_explain(cls, fault, called) for fault in faults[:_FAULTS]]
        if faults[0]["type"] == "json_invalid":  # a byte of a file's name that is not UTF-8
            said = [
                f"{called(key)} = {_shown(value)}: {wrong}"
                for key, value in flat(tree, lists=True).items()
                if (wrong := _not_utf8(json.dumps(value, ensure_ascii=False, default=str)))
            ] or said
        more = [f"and {len(faults) - _FAULTS:,} more"] if len(faults) > _FAULTS else []
        raise UserError("; ".join(said + more)) from None


def _not_utf8(text: str) -> str:
    """Why a text cannot be a value, and what to do; empty where it can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            os.fsencode(text).decode()
        except UnicodeError:
            return "the name is not UTF-8; rename it"
        return "Python reads names of files as ASCII here; set PYTHONUTF8=1"
    return ""


def dump(value: Any) -> dict[str, Any]:
    """Nested dicts and lists of plain values, of which `build` makes an equal one."""
    cls: type = type(value)
    return _adapter(cls).dump_python(value, mode="json")


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def nearest(cls: type, key: str) -> str:
    """`the nearest is …`: the field or section of `cls` whose name is most like a dotted one."""
    parent, _, last = key.rpartition(".")
    inside = re.sub(r"\.\d+(?=\.|$)", "[]", parent) + "."  # of a list's item, as `describe` calls it
    own = [name.removeprefix(inside) for name, *_ in describe(cls, items=True) if name.startswith(inside)]
    if "[]" in inside and own:  # another's field would not do
        return f"the nearest is `{parent}.{difflib.get_close_matches(last, own, n=1, cutoff=0.0)[0]}`"
    names = [name for name, *_ in describe(cls)]
    sections = sorted({name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)})
    same_leaf = [n for n in names if n.rsplit(".", 1)[-1] == last]
    close: Sequence[str] = same_leaf or difflib.get_close_matches(key, names + sections, n=1, cutoff=0.0)
    return f"the nearest is `{close[0]}`"


def _explain(cls: type, error: Any, called: Callable[[str], str]) -> str:
    """One line for one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"there is no {called(key)}; {nearest(cls, key)}"
    if error["type"] == "missing":
        return f"{called(key)} is required"
    if error["type"] == "value_error":  # our own, from __post_init__
        return str(error["ctx"]["error"])
    if error["type"] == "dataclass_type":
        return f"config section `{key}` is {_shown(error['input'])}; it must be a mapping of fields"
    return f"{called(key)} = {_shown(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _shown(value: Any) -> str:
    """A value in an error message: its beginning, where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
