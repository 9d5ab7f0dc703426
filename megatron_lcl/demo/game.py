"""The JSON and the tile sheets of the game Cataclysm: Dark Days Ahead, as its documentation describes them.

Objects inherit fields by `copy-from` (JSON_INHERITANCE.md); a tileset's `tile_config.json` numbers the sprites of all
its sheets through and names those of each object (TILESET.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as Pillow

from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import below

KINDS = {
    "ARMOR": "clothing", "TOOL_ARMOR": "clothing", "PET_ARMOR": "clothing",
    "COMESTIBLE": "food and medicine", "TOOL": "tool", "BOOK": "book", "GENERIC": "other item",
    "GUN": "gun", "GUNMOD": "part of a gun", "MAGAZINE": "ammunition", "AMMO": "ammunition",
    "BIONIC_ITEM": "bionic", "TOOLMOD": "tool",
    "BATTERY": "part of a vehicle", "ENGINE": "part of a vehicle", "WHEEL": "part of a vehicle",
    "vehicle_part": "part of a vehicle",
    "MONSTER": "creature", "furniture": "furniture", "terrain": "terrain",
}  # fmt: skip
"""types of objects that are things to look at, and what they are called here"""
_SPACES = {"MONSTER": "monster", "furniture": "furniture", "terrain": "terrain", "vehicle_part": "vehicle part"}
"""types whose ids are their own; all others share one space"""
_SPRITE_PREFIX = {"vehicle_part": "vp_"}
_TAG = re.compile(r"</?[a-z_]+>")
MIN_PIXELS = 12
"""visible ones; sprites with fewer are markers for what is not drawn"""


@dataclass(frozen=True, slots=True)
class Thing:
    """Something with a name and a description."""

    id: str
    """as tilesets name it"""
    name: str
    description: str
    kind: str
    topic: str
    """the file that it stands in, as words"""


@dataclass(frozen=True)
class Game:
    """What the game's JSON files hold, in the order of files."""

    things: dict[str, Thing]
    """by id"""
    recipes: list[tuple[str, list[tuple[int, str]]]]
    """what is made, and of how many of which things (the first choice of each)"""
    groups: list[tuple[str, list[str]]]
    """creatures that are found together, under a name"""


def read_game(folder: Path) -> Game:
    """The objects in `folder`/json. UserError where that is no folder of the game's data."""
    objects: dict[tuple[str, str], tuple[Mapping[str, Any], str]] = {}
    recipes, groups = [], []
    for entry, topic in _objects(folder / "json"):
        kind = entry.get("type")
        if kind in KINDS:
            for name in _ids(entry):
                objects[_SPACES.get(kind, "item"), name] = entry, topic
        elif kind == "recipe" and isinstance(entry.get("result"), str):
            recipes.append((entry["result"], _components(entry)))
        elif kind == "monstergroup":
            members = [m["monster"] for m in entry.get("monsters", ()) if isinstance(m.get("monster"), str)]
            groups.append((_words(str(entry.get("name", entry.get("id", ""))).removeprefix("GROUP_")), members))
    things = {}
    for (space, name), (entry, topic) in objects.items():
        label, description = (_text(_inherited(objects, space, name, field)) for field in ("name", "description"))
        if "abstract" not in entry and label and description:
            kind = KINDS[entry["type"]]
            id = _SPRITE_PREFIX.get(entry["type"], "") + name
            things[id] = Thing(id, label, description, kind, topic if topic.startswith(kind) else f"{kind}: {topic}")
    if not things:
        raise UserError(f"{folder} has no data of the game; give the package of Debian that the documentation names")
    return Game(things, recipes, groups)


def _objects(folder: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    for file in sorted(below(folder, "*.json")):
        if "obsolet" in str(file.relative_to(folder)):  # kept for old saved games
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        for entry in content if isinstance(content, list) else [content]:
            if isinstance(entry, dict):
                yield entry, _words(file.stem)


def _ids(entry: Mapping[str, Any]) -> list[str]:
    ids = entry.get("abstract", entry.get("id", []))
    return [ids] if isinstance(ids, str) else list(ids)


def _inherited(
    objects: Mapping[tuple[str, str], tuple[Mapping[str, Any], str]], space: str, name: str, field: str
) -> Any:
    """A field of an object, or that of the nearest one it copies from which has it."""
    seen = set[str]()
    while name not in seen and (space, name) in objects:
        seen.add(name)
        entry = objects[space, name][0]
        if field in entry:
            return entry[field]
        name = entry.get("copy-from", "")
    return None


def _text(value: Any) -> str:
    """Of a string or of its translatable form, {"str": …} or {"str_sp": …}; without color tags, in single spaces."""
    if isinstance(value, dict):
        value = value.get("str", value.get("str_sp"))
    return " ".join(_TAG.sub("", value).split()) if isinstance(value, str) else ""


def _words(name: str) -> str:
    return " ".join(re.split(r"[_\-\s]+", name)).strip().lower()


def _components(entry: Mapping[str, Any]) -> list[tuple[int, str]]:
    found = []
    for choices in entry.get("components", ()):
        first = choices[0] if choices and isinstance(choices[0], list) else choices
        if len(first) == 2 and isinstance(first[0], str) and isinstance(first[1], int):  # three: a list of its own
            found.append((first[1], first[0]))
    return found


# --- tilesets ----------------------------------------------------------------------------------------------------


def read_sprites(folder: Path, ids: Mapping[str, object]) -> dict[str, Pillow.Image]:
    """The sprites of a tileset for those of its objects that are in `ids`, RGBA, without transparent margins.

    Objects with one sprite have the same image object.
    """
    config = json.loads((folder / "tile_config.json").read_text(encoding="utf-8"))
    info = config["tile_info"][0]
    sheets: list[tuple[int, Pillow.Image, int, int]] = []
    number: dict[str, int] = {}
    end = 0
    for sheet in config["tiles-new"]:
        for tile in sheet["tiles"]:
            sprite = _first_sprite(tile.get("fg"))
            sprite = _first_sprite(tile.get("bg")) if sprite is None else sprite
            for name in [tile["id"]] if isinstance(tile["id"], str) else tile["id"]:
                if name in ids and sprite is not None:
                    number.setdefault(name, sprite)
        if "ascii" in sheet:  # letters for what has no sprite
            continue
        image = Pillow.open(folder / sheet["file"]).convert("RGBA")
        width, height = sheet.get("sprite_width", info["width"]), sheet.get("sprite_height", info["height"])
        sheets.append((end, image, width, height))
        end += (image.width // width) * (image.height // height)
    cut: dict[int, Pillow.Image | None] = {}
    for sprite in number.values():
        if sprite not in cut:
            cut[sprite] = _cut(sheets, sprite) if 0 <= sprite < end else None
    return {name: found for name, sprite in number.items() if (found := cut[sprite]) is not None}


def _first_sprite(value: Any) -> int | None:
    """Of a number, or the first of a list of rotations or of weighted variants."""
    while isinstance(value, list | dict):
        value = value.get("sprite") if isinstance(value, dict) else next(iter(value), None)
    return value if isinstance(value, int) and value >= 0 else None


def _cut(sheets: list[tuple[int, Pillow.Image, int, int]], sprite: int) -> Pillow.Image | None:
    start, image, width, height = next(sheet for sheet in reversed(sheets) if sheet[0] <= sprite)
    row, column = divmod(sprite - start, image.width // width)
    tile = image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
    alpha = tile.getchannel("A")
    box = alpha.getbbox()
    if box is None or sum(alpha.histogram()[1:]) < MIN_PIXELS:
        return None
    return tile.crop(box)
