"""Things of a game, each drawn by several artists, with a description: from Debian's package cataclysm-dda-data."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash
from PIL import Image as Pillow

from megatron_lcl.demo.documents import Record, record
from megatron_lcl.demo.game import Game, read_game, read_sprites
from megatron_lcl.demo.licenses import License
from megatron_lcl.demo.packages import Fetched, Package, unpack_debian
from megatron_lcl.demo.pictures import Picture
from megatron_lcl.demo.write import DataSet
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_file

PACKAGE = Package(
    "apt-get",
    "cataclysm-dda-data",
    "0.H-1",
    "6b225d32b22197e1cf7449aea22027664fca63dccbfbcbcf1af4e3e03a4f2a1c",
)
PACKAGES = (PACKAGE,)
ARTISTS = (
    "UltimateCataclysm", "MshockXotto+", "GiantDays", "NeoDaysTileset", "RetroDaysTileset", "BrownLikeBears",
    "SmashButton_iso", "HollowMoon", "Cuteclysm",
)  # fmt: skip
"""tilesets; of those that share sprites the one whose they are comes first. Altica, ChibiUltica and Ultica_iso have the
sprites of the first two, but for 68; the rest are letters or maps"""
HELD_OUT_ARTIST = "GiantDays"
SIDE = 64
"""pixels, at least; sprites are enlarged by whole numbers"""
_MIN_MEMBERS, _MAX_MEMBERS = 3, 7
_ROOT, _COPYRIGHT = "usr/share/games/cataclysm-dda", "usr/share/doc/cataclysm-dda-data/copyright"


def data_set(fetched: Sequence[Fetched], folder: Path, workers: int) -> DataSet:
    """All pictures of the package, which is unpacked in `folder`."""
    (package,) = fetched
    root = folder / f"{PACKAGE.name}-{package.version}"
    unpack_debian(package.file, root)
    game = read_game(root / _ROOT)
    pictures, ids = _pictures(game, root / _ROOT / "gfx")
    attribution = "Cataclysm: Dark Days Ahead, by its contributors: names and descriptions; sprites of the tilesets "
    attribution += f"{', '.join(ARTISTS)}, cut out and enlarged. Whom to name, and the license:"
    return DataSet(
        "things",
        pictures,
        [
            License(
                f"{PACKAGE.name} {package.version}",
                "CC-BY-SA-3.0",
                attribution,
                (root / _COPYRIGHT).read_text(encoding="utf-8"),
            )
        ],
        held_out_artist=HELD_OUT_ARTIST,
        held_out_names=0.0,
        vocab_size=4096,
        max_words=120,
        more=lambda some: [*recipes(game, some, ids), *groups(game, some, ids)],
    )


def _pictures(game: Game, gfx: Path) -> tuple[list[Picture], dict[str, str]]:
    """All artists' pictures, copies of another's left out; and the thing's id of each by the picture's file."""
    pictures, ids = [], {}
    seen = set[tuple[str, bytes]]()
    for artist in ARTISTS:
        if not is_file(gfx / artist / "tile_config.json"):
            raise UserError(f"the package has no tileset {artist}; its documented version is {PACKAGE.version}")
        sprites = read_sprites(gfx / artist, game.things)
        content = {name: xxhash.xxh3_128_digest(sprite.tobytes()) for name, sprite in sprites.items()}
        encoded: dict[bytes, bytes] = {}
        for name in sorted(sprites):
            thing, digest = game.things[name], content[name]
            if (name, digest) in seen:
                continue
            seen.add((name, digest))
            if digest not in encoded:
                encoded[digest] = enlarged(sprites[name])
            file = f"pictures/{artist}/{re.sub('[^A-Za-z0-9_.-]', '-', name)}.png"
            assert file not in ids
            ids[file] = name
            pictures.append(
                Picture(
                    artist,
                    thing.name,
                    thing.description,
                    thing.kind,
                    thing.topic,
                    file,
                    encoded[digest],
                )
            )
    return pictures, ids


def enlarged(sprite: Pillow.Image) -> bytes:
    """As PNG: in the middle of a transparent square, enlarged by a whole number to at least SIDE pixels."""
    side = max(sprite.size)
    factor = -(-SIDE // side)
    square = Pillow.new("RGBA", (side, side))
    square.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
    content = io.BytesIO()
    square.resize((side * factor, side * factor), Pillow.Resampling.NEAREST).save(content, "PNG")
    return content.getvalue()


def recipes(game: Game, pictures: Sequence[Picture], ids: dict[str, str]) -> Iterator[Record]:
    """What a thing is like, its picture, its name, and what it is made of, with pictures: each by one artist."""
    by_id = _by_id(pictures, ids)
    for number, (result, components) in enumerate(game.recipes):
        enough = {
            artist: parts
            for artist, picture in by_id.get(result, {}).items()
            if len(parts := _drawn(by_id, [name for _, name in components], artist)) >= 2 and picture.about
        }
        if enough:
            artist = _one_of(sorted(enough), f"recipe {number}")
            picture = by_id[result][artist]
            items = [{"text": picture.about}, {"image": picture.file}, {"text": f"{picture.name}, made of"}]
            amount = {name: count for count, name in components}
            for part in enough[artist][:_MAX_MEMBERS]:
                items += [{"text": f"{amount[ids[part.file]]} {part.name}"}, {"image": part.file}]
            yield record(items)


def groups(game: Game, pictures: Sequence[Picture], ids: dict[str, str]) -> Iterator[Record]:
    """Creatures that are found together: all their names, then all pictures, by one artist."""
    by_id = _by_id(pictures, ids)
    for number, (name, members) in enumerate(game.groups):
        artists = sorted({artist for member in members for artist in by_id.get(member, ())})
        enough = {a: drawn for a in artists if len(drawn := _drawn(by_id, members, a)) >= _MIN_MEMBERS}
        if enough:
            drawn = enough[_one_of(sorted(enough), f"group {number}")][:_MAX_MEMBERS]
            text = f"Creatures found together ({name}): {'; '.join(picture.name for picture in drawn)}."
            yield record([{"text": text}, *({"image": picture.file} for picture in drawn)])


def _by_id(pictures: Sequence[Picture], ids: dict[str, str]) -> dict[str, dict[str, Picture]]:
    found: dict[str, dict[str, Picture]] = {}
    for picture in pictures:
        found.setdefault(ids[picture.file], {})[picture.artist] = picture
    return found


def _drawn(by_id: dict[str, dict[str, Picture]], names: Sequence[str], artist: str) -> list[Picture]:
    """An artist's pictures of things, each once."""
    return [by_id[name][artist] for name in dict.fromkeys(names) if artist in by_id.get(name, {})]


def _one_of(artists: Sequence[str], purpose: str) -> str:
    return artists[xxhash.xxh3_64_intdigest(purpose.encode()) % len(artists)]
