"""What a model's name says: the library, the model, and options behind `?`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_lcl.errors import UserError

KINDS = {"timm": ("pretrained", "seed"), "hf": (), "open_clip": ("seed",), "random": ("seed",)}
"""prefix → the options that it takes"""
_PARTS = ("vision", "language")
"""the encoders that `train.init_from` may name a library's model for"""
_OPTIONS = re.compile(r"\w+=[^&=?]*(&\w+=[^&=?]*)*")
_UNTRAINED = "untrained encoders are random:CONFIG, timm:NAME?pretrained=no and open_clip:NAME@none, with ?seed=N"


@dataclass(frozen=True)
class Spec:
    """A model's name, taken apart."""

    text: str
    kind: str
    """a key of KINDS; empty: the path of an LCL checkpoint"""
    name: str
    """without the prefix and the options"""
    seed: int | None = None
    """of an untrained model's parameters; None: pre-trained"""


def parse_spec(text: str) -> Spec:
    """UserError for an option that the kind does not take."""
    kind, _, name = text.partition(":")
    if kind not in KINDS or not name:
        return Spec(text, "", text)
    before, mark, query = name.rpartition("?")
    options: dict[str, str] = {}
    if mark and _OPTIONS.fullmatch(query):
        name, options = before, dict(part.split("=") for part in query.split("&"))
    if unknown := sorted(options.keys() - set(KINDS[kind])):
        raise UserError(f"{text}: {kind} takes no option {unknown[0]!r}; {_UNTRAINED}")
    pretrained = kind != "random"
    if kind == "timm":
        pretrained = _truth(text, options.pop("pretrained", "yes"))
    elif kind == "open_clip" and name.endswith("@none"):
        name, pretrained = name.removesuffix("@none"), False
    if pretrained and options:
        raise UserError(f"{text}: only an untrained encoder has a seed; {_UNTRAINED}")
    return Spec(text, kind, name, None if pretrained else _number(text, options.get("seed", "0")))


def is_ours(spec: str) -> bool:
    """Whether `spec` is an LCL model rather than another library's."""
    return parse_spec(spec).kind in ("", "random")


def library_specs(text: str) -> dict[str, str]:
    """Which library's model each encoder begins with; nothing where `train.init_from` is a path.

    UserError for a part that is none, or a model that is no other library's.
    """
    if not text.startswith(tuple(f"{part}=" for part in _PARTS)):
        return {} if is_ours(text) else dict.fromkeys(_PARTS, text)
    specs: dict[str, str] = {}
    for word in text.split(","):
        part, _, spec = word.partition("=")
        if part not in _PARTS or part in specs or not spec or is_ours(spec):
            raise UserError(
                f"train.init_from = {text}: {word!r} is not one of vision=MODEL and language=MODEL, with a MODEL such "
                "as timm:NAME, hf:NAME or open_clip:NAME@TAG"
            )
        specs[part] = spec
    return specs


def _truth(text: str, word: str) -> bool:
    known = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if word not in known:
        raise UserError(f"{text}: pretrained={word} is neither yes nor no")
    return known[word]


def _number(text: str, word: str) -> int:
    if not word.isdecimal():
        raise UserError(f"{text}: seed={word} is no number from 0")
    return int(word)
