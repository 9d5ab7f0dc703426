"""Emoji: one name drawn by eight artists, from packages of npm.

The drawings are SVG bodies in Iconify's JSON format (`icons.json`: `icons`, `aliases`, sizes; `chars.json`: hexadecimal
code points → icon); labels, tags, groups and order are Unicode's, as emojibase-data has them (`en/data.json`). Skin
tones, hair, regional indicators are left out: an emoji is drawn once by an artist.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lcl.data.prepare.workers import in_order
from megatron_lcl.demo.licenses import License
from megatron_lcl.demo.packages import Fetched, Package, read_npm
from megatron_lcl.demo.pictures import Picture
from megatron_lcl.demo.write import DataSet
from megatron_lcl.errors import UserError

SIDE = 72
"""pixels"""
NAMES = Package("npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
_ARTISTS = {
    "emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
}
DRAWINGS = {
    artist: Package("npm", f"@iconify-json/{artist}", version, sha256) for artist, (version, sha256) in _ARTISTS.items()
}
PACKAGES = (NAMES, *DRAWINGS.values())
HELD_OUT_ARTIST, HELD_OUT_NAMES = "twemoji", 0.1
_DATA, _GROUPS, _UNICODE = "en/data.json", "en/messages.json", "meta/unicode-names.json"
_SHORTCODES = tuple(f"en/shortcodes/{name}.json" for name in ("emojibase", "cldr", "github", "iamcal", "joypixels"))
_FEW = 512
"""drawings that are done before other processes have begun"""
_COMPONENTS = "component"
"""the group of skin tones and hair"""


@dataclass(frozen=True)
class Emoji:
    """A name, and what is said of it."""

    code: str
    """lower-case hexadecimal code points joined by hyphens, without variation selectors"""
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def data_set(fetched: Sequence[Fetched], folder: Path, workers: int) -> DataSet:
    """All pictures of the packages `PACKAGES`, rasterized by `workers` processes. UserError without resvg."""
    packages = {entry.package.name: entry for entry in fetched}
    names = read_npm(packages[NAMES.name].file, [_DATA, _GROUPS, _UNICODE, *_SHORTCODES, "LICENSE"])
    emoji = read_emoji(json.loads(names[_DATA]), json.loads(names[_GROUPS]))
    icons: dict[str, dict[str, Any]] = {}
    chars: dict[str, dict[str, str]] = {}
    licenses = [License(_title(packages[NAMES.name]), "MIT", "Labels and tags.", names["LICENSE"].decode())]
    for artist, package in DRAWINGS.items():
        entry = packages[package.name]
        files = read_npm(entry.file, ["icons.json", "chars.json", "info.json"])
        icons[artist], chars[artist] = json.loads(files["icons.json"]), json.loads(files["chars.json"])
        licenses.append(_license(entry, json.loads(files["info.json"])))
    aliases = Aliases(emoji, icons, chars, names)
    drawings = [
        (artist, emoji[code], svg(icons[artist], icon))
        for artist in DRAWINGS
        for code, icon in aliases.icons_of(artist).items()
    ]
    drawings.sort(key=lambda drawing: (drawing[0], drawing[1].code))
    images = rasterize([body for _, _, body in drawings], workers)
    pictures = [
        Picture(
            artist,
            entry.label,
            ", ".join(entry.tags),
            entry.group,
            f"{entry.group}: {entry.subgroup}",
            f"pictures/{artist}/{entry.code}.png",
            image,
        )
        for (artist, entry, _), image in zip(drawings, images, strict=True)
    ]
    return DataSet(
        "emoji",
        pictures,
        licenses,
        held_out_artist=HELD_OUT_ARTIST,
        held_out_names=HELD_OUT_NAMES,
        vocab_size=2048,
        max_words=10**9,
    )


def read_emoji(data: Sequence[Mapping[str, Any]], messages: Mapping[str, Any]) -> dict[str, Emoji]:
    """By code, in Unicode's order: those of `en/data.json` that belong to a group other than components."""
    groups = {entry["order"]: entry for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    found = {}
    for entry in sorted((e for e in data if "group" in e), key=lambda e: e["order"]):
        group = groups[entry["group"]]
        if group["key"] != _COMPONENTS:
            emoji = Emoji(
                code_of(entry["hexcode"]),
                entry["label"],
                tuple(tag for tag in entry.get("tags", ()) if tag != entry["label"]),
                group["message"],
                subgroups[entry["subgroup"]],
            )
            found[emoji.code] = emoji
    return found


def code_of(hexcode: str) -> str:
    """Lower case, and without the selector of emoji presentation, which some write and others do not."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


class Aliases:
    """Which icon of an artist draws which emoji.

    By code points where the artist's package says them (`chars.json`). Others name their icons by labels of several
    years: today's, those of artists whose package says code points, Unicode's names of characters, and shortcodes are
    tried in this order, without case, spaces and punctuation; a name that stands for several emoji is not used.
    """

    def __init__(
        self,
        emoji: Mapping[str, Emoji],
        icons: Mapping[str, Mapping[str, Any]],
        chars: Mapping[str, Mapping[str, str]],
        files: Mapping[str, bytes],
    ) -> None:
        self._icons = icons
        self._by_code: dict[str, dict[str, str]] = {}
        """artist → code → icon"""
        for artist, codes in chars.items():
            found: dict[str, str] = {}
            for hexcode, icon in codes.items():
                if (code := code_of(hexcode)) in emoji and has_icon(icons[artist], icon):
                    found.setdefault(code, icon)
            self._by_code[artist] = found
        self._names: list[dict[str, set[str]]] = []
        """of each source: plain name → codes"""
        for pairs in (self._labels(emoji), self._others(), *self._files(emoji, files)):
            names: dict[str, set[str]] = {}
            for name, code in pairs:
                if plain := plain_name(name):
                    names.setdefault(plain, set()).add(code)
            self._names.append(names)

    def icons_of(self, artist: str) -> dict[str, str]:
        """code → icon, of every emoji that the artist has drawn."""
        if self._by_code[artist]:
            return self._by_code[artist]
        found: dict[str, str] = {}
        for icon in (*self._icons[artist]["icons"], *self._icons[artist].get("aliases", ())):
            if (code := self._code(icon)) is not None and has_icon(self._icons[artist], icon):
                found.setdefault(code, icon)
        return found

    def _code(self, icon: str) -> str | None:
        for names in self._names:
            codes = names.get(plain_name(icon), set())
            if codes:
                return next(iter(codes)) if len(codes) == 1 else None
        return None

    def _labels(self, emoji: Mapping[str, Emoji]) -> Iterator[tuple[str, str]]:
        for code, entry in emoji.items():
            yield entry.label, code
            if entry.label.startswith("flag: "):
                yield f"flag for {entry.label[6:]}", code

    def _others(self) -> Iterator[tuple[str, str]]:
        for artist, codes in self._by_code.items():
            code_of_icon = {icon: code for code, icon in codes.items()}
            yield from code_of_icon.items()
            for alias, entry in self._icons[artist].get("aliases", {}).items():
                if entry.keys() == {"parent"} and entry["parent"] in code_of_icon:
                    yield alias, code_of_icon[entry["parent"]]

    def _files(self, emoji: Mapping[str, Emoji], files: Mapping[str, bytes]) -> Iterator[list[tuple[str, str]]]:
        for part in ((_UNICODE,), _SHORTCODES):
            pairs = []
            for file in part:
                for hexcode, names in json.loads(files[file]).items():
                    if (code := code_of(hexcode)) in emoji:
                        pairs += [(name, code) for name in ([names] if isinstance(names, str) else names)]
            yield pairs


def plain_name(name: str) -> str:
    """Without case, accents, spaces and punctuation."""
    ascii = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", ascii)


def has_icon(icons: Mapping[str, Any], name: str) -> bool:
    """Whether a set has an icon of this name, or an alias of one."""
    seen = set[str]()
    while name not in icons["icons"] and name not in seen:
        seen.add(name)
        name = icons.get("aliases", {}).get(name, {}).get("parent", "")
    return name in icons["icons"]


def svg(icons: Mapping[str, Any], name: str) -> str:
    """An icon as a whole, square SVG file; aliases may mirror and turn their parent."""
    turns, h_flip, v_flip = 0, False, False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        turns += alias.get("rotate", 0)
        h_flip ^= alias.get("hFlip", False)
        v_flip ^= alias.get("vFlip", False)
        name = alias["parent"]
    icon = icons["icons"][name]
    left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    x, y, side = left + width / 2, top + height / 2, max(width, height)
    body = icon["body"]
    if turns % 4 or h_flip or v_flip:
        scale = f"scale({-1 if h_flip else 1} {-1 if v_flip else 1})"
        body = f'<g transform="translate({x} {y}) rotate({turns % 4 * 90}) {scale} translate({-x} {-y})">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{x - side / 2} {y - side / 2} {side} {side}">{body}</svg>'
    )


def rasterize(drawings: Sequence[str], workers: int) -> list[bytes]:
    """SVG files as PNG of SIDE x SIDE pixels. UserError where resvg is missing."""
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise UserError(
            "resvg is not installed, which turns the drawings into pixels; `pip install 'megatron-lcl[demo]'`"
        ) from None
    return list(in_order(_rasterize, None, drawings, workers if len(drawings) >= _FEW else 1))


def _rasterize(_: None, drawing: str) -> bytes:
    import resvg_py

    # fonts of this machine would make other pixels elsewhere
    return bytes(resvg_py.svg_to_bytes(svg_string=drawing, width=SIDE, height=SIDE, skip_system_fonts=True))


def _license(fetched: Fetched, info: Mapping[str, Any]) -> License:
    license, author = info["license"], info["author"]
    lines = [f"{info['name']} by {author['name']} ({author.get('url', '')}).", f"License: {license.get('url', '')}"]
    lines.append(f"The drawings were rasterized at {SIDE} x {SIDE} pixels, and are otherwise unchanged.")
    return License(_title(fetched), license["spdx"], "\n".join(lines))


def _title(fetched: Fetched) -> str:
    return f"{fetched.package.name} {fetched.version}"
