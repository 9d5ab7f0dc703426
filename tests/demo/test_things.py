"""Protects `demo things`: what the game's files say of a thing, which sprite it has, and the documents made of them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from megatron_lcl.cli import main
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.demo import game, things
from megatron_lcl.demo.packages import fetch, unpack_debian
from megatron_lcl.evaluate.sources import open_images

OBJECTS: dict[str, list[dict[str, Any]]] = {
    "items/tool/cooking.json": [
        {"abstract": "base", "type": "TOOL", "name": "base", "description": "For   <color_red>hot</color> food."},
        {"id": "pot", "type": "TOOL", "copy-from": "base", "name": {"str": "iron pot", "str_pl": "iron pots"}},
        {"id": ["pan", "wok"], "type": "GENERIC", "copy-from": "pot", "name": {"str_sp": "pan"}, "description": "Flat"},
        {"id": "lid", "type": "TOOL", "name": "lid", "description": {"str": "It closes."}},
        {"id": "ring", "type": "TOOL", "copy-from": "ring", "name": "ring"},  # in itself, without description
        {"id": "spoon", "type": "TOOL", "name": {"ctxt": "tool", "str": "spoon"}, "description": "To stir."},
    ],
    "items/comestibles/soup.json": [
        {"id": "soup", "type": "COMESTIBLE", "name": "soup", "description": "Warm soup."},
        {"id": "salt", "type": "COMESTIBLE", "name": "salt", "description": "White salt."},
    ],
    "monsters/bird.json": [
        {"id": f"mon_{k}", "type": "MONSTER", "name": {"str": f"bird {k}"}, "description": f"Bird number {k}."}
        for k in range(5)
    ],
    "vehicleparts/wheel.json": [
        {"id": "wheel", "type": "vehicle_part", "name": "wheel", "description": "It turns."},
        {"id": "pot", "type": "furniture", "name": "flower pot", "description": "A space of its own."},
    ],
    "obsoletion/old.json": [{"id": "old", "type": "TOOL", "name": "old thing", "description": "Gone."}],
    "recipes/food.json": [
        {"type": "recipe", "result": "soup",
         "components": [[["salt", 2], ["pan", 1]], [["spoon", 1]], [["many", 1, "LIST"]]]},
        {"type": "recipe", "result": "nothing", "components": [[["salt", 2]]]},
    ],
    "monstergroups/birds.json": [
        {"type": "monstergroup", "id": "GROUP_PARK_BIRDS", "monsters": [{"monster": f"mon_{k}"} for k in (0, 2, 4, 2)]}
    ],
}  # fmt: skip
IDS = ("pot", "pan", "lid", "spoon", "soup", "salt", *(f"mon_{k}" for k in range(5)), "vp_wheel")


def sprite(artist: int, k: int, width: int, height: int) -> np.ndarray:
    """Noise of an artist and a thing, visible but for its rim."""
    pixels = np.random.default_rng((artist, k)).integers(0, 256, (height, width, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[1:-1, 2:-2, 3] = 255
    return pixels


def write_tileset(folder: Path, artist: int) -> None:
    """Two sheets, of 10 x 12 and of 20 x 20 pixels, in rows of four; the second one's numbers go on."""
    folder.mkdir(parents=True)
    first, second = np.zeros((24, 40, 4), np.uint8), np.zeros((40, 80, 4), np.uint8)
    for k in range(8):
        first[k // 4 * 12 :, k % 4 * 10 :][:12, :10] = sprite(artist, k, 10, 12)
        second[k // 4 * 20 :, k % 4 * 20 :][:20, :20] = sprite(artist, 8 + k, 20, 20)
    Pillow.fromarray(first).save(folder / "small.png")
    Pillow.fromarray(second).save(folder / "large.png")
    tiles: list[dict[str, Any]] = [{"id": name, "fg": k} for k, name in enumerate(IDS)]
    tiles[2]["fg"] = [2, 3]  # rotations
    tiles[3]["fg"] = [{"weight": 9, "sprite": [3, 1]}, {"weight": 1, "sprite": 5}]
    tiles[4] = {"id": "soup", "bg": 4}
    tiles[5]["id"] = ["salt", "wok"]  # one sprite for two things
    config = {
        "tile_info": [{"width": 10, "height": 12}],
        "tiles-new": [
            {"file": "small.png", "tiles": tiles[:8]},
            {"file": "large.png", "sprite_width": 20, "sprite_height": 20, "tiles": [*tiles[8:], {"id": "x", "fg": 9}]},
            {"file": "fallback.png", "tiles": [], "ascii": []},
        ],
    }
    (folder / "tile_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def root(once: Callable[..., Any]) -> Path:
    """The tree of a small package."""

    def make(folder: Path) -> Path:
        data = folder / "tree" / "usr/share/games/cataclysm-dda"
        for name, objects in OBJECTS.items():
            (data / "json" / name).parent.mkdir(parents=True, exist_ok=True)
            (data / "json" / name).write_text(json.dumps(objects))
        for number, artist in enumerate(things.ARTISTS):  # the last has the first one's sprites
            write_tileset(data / "gfx" / artist, number % (len(things.ARTISTS) - 1))
        copyright = folder / "tree" / "usr/share/doc/cataclysm-dda-data/copyright"
        copyright.parent.mkdir(parents=True)
        copyright.write_text("License: CC-BY-SA-3.0\n")
        return folder / "tree"

    return once("demo-things", make)


def test_what_the_game_says_of_a_thing(root: Path) -> None:
    read = game.read_game(root / "usr/share/games/cataclysm-dda")
    found = {name: (thing.name, thing.description, thing.kind, thing.topic) for name, thing in read.things.items()}
    assert found["pot"] == ("flower pot", "A space of its own.", "furniture", "furniture: wheel")
    assert found["pan"] == found["wok"] == ("pan", "Flat", "other item", "other item: cooking")
    assert found["lid"] == ("lid", "It closes.", "tool", "tool: cooking")
    assert found["spoon"][0] == "spoon"
    assert found["vp_wheel"] == ("wheel", "It turns.", "part of a vehicle", "part of a vehicle: wheel")
    assert found["mon_3"] == ("bird 3", "Bird number 3.", "creature", "creature: bird")
    assert not {"ring", "base", "old"} & found.keys()
    assert read.recipes == [("soup", [(2, "salt"), (1, "spoon")]), ("nothing", [(2, "salt")])]
    assert read.groups == [("park birds", ["mon_0", "mon_2", "mon_4", "mon_2"])]


def test_inherited_fields_lose_their_color_tags(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "pots.json").write_text(json.dumps(OBJECTS["items/tool/cooking.json"]))
    pot = game.read_game(tmp_path).things["pot"]
    assert (pot.name, pot.description) == ("iron pot", "For hot food.")
    with pytest.raises(ValueError, match="has no data of the game"):
        game.read_game(tmp_path / "json")


def test_each_thing_has_its_sprite(root: Path) -> None:
    folder = root / "usr/share/games/cataclysm-dda/gfx" / things.ARTISTS[2]
    sprites = game.read_sprites(folder, dict.fromkeys((*IDS, "wok")))
    assert set(sprites) == {*IDS, "wok"}
    for k, name in enumerate(IDS):
        size = (10, 12) if k < 8 else (20, 20)
        assert (np.asarray(sprites[name]) == sprite(2, k, *size)[1:-1, 2:-2]).all(), name
    assert sprites["wok"] is sprites["salt"]


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb on this machine")
    tree, given, out = tmp_path / "tree", tmp_path / "given", tmp_path / "out"
    shutil.copytree(root, tree)
    given.mkdir()
    (tree / "DEBIAN").mkdir()
    name = things.PACKAGE.name
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 9\nArchitecture: all\nMaintainer: nobody\nDescription: game\n"
    )
    command = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(given / f"{name}_9_all.deb")]
    subprocess.run(command, check=True, capture_output=True)
    assert main(["demo", "things", "--from", str(given), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{name} is version 9; the documented numbers are of {things.PACKAGE.version}" in said
    num_artists = len(things.ARTISTS) - 1  # what copies another's sprites is left out
    assert f"{13 * num_artists} pictures of 12 names by {num_artists} artists" in said
    picture = Pillow.open(out / "documents" / "pictures" / things.ARTISTS[0] / "lid.png")
    small = sprite(0, 2, 10, 12)[1:-1, 2:-2]  # 6 x 10 pixels
    large = np.asarray(picture)
    assert large.shape == (70, 70, 4)
    assert (large[:, 14:56] == small.repeat(7, 0).repeat(7, 1)).all()
    assert not large[:, :14, 3].any()
    assert not large[:, 56:, 3].any()
    lines = {n: read(out / "documents" / f"{n}.jsonl") for n in ("labels", "contexts", "pairs", "heldout")}
    (recipe,) = [line for line in lines["contexts"] if "soup, made of" in line]
    assert [item for item in recipe if not item.endswith(".png")] == [
        "Warm soup.",
        "soup, made of",
        "2 salt",
        "1 spoon",
    ]
    (group,) = [line for line in lines["contexts"] if "found together" in line[0]]
    assert group[0] == "Creatures found together (park birds): bird 0; bird 2; bird 4."
    assert [item.rsplit("/", 1)[1] for item in group[1:]] == ["mon_0.png", "mon_2.png", "mon_4.png"]
    for part, of in lines.items():
        artists = {item.split("/")[1] for line in of for item in line if item.endswith(".png")}
        assert (artists == {things.HELD_OUT_ARTIST}) == (part == "heldout")
        assert things.HELD_OUT_ARTIST in artists or part != "heldout"
        assert verify(out / "corpora" / part) == []
    assert "License: CC-BY-SA-3.0" in (out / "LICENSES").read_text()
    asked = open_images(out / "evaluate" / "artist")
    assert len(asked) == len(asked.classes) == 11  # salt and wok are one picture
    assert "salt" not in asked.classes
    assert open_images(out / "evaluate" / "kinds", "train").classes[:2] == ("creature", "food and medicine")


def read(file: Path) -> list[list[str]]:
    """The texts and images of each line."""
    lines = file.read_text().splitlines()
    return [[next(iter(item.values())) for item in json.loads(line)["items"]] for line in lines]


@pytest.mark.slow
def test_the_real_game(tmp_path: Path) -> None:
    """Where Debian's packages are in reach: what is in the package, counted another way."""
    try:
        (fetched,) = fetch([things.PACKAGE], tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    if not fetched.is_recorded:
        pytest.skip(f"this release has version {fetched.version}")
    unpack_debian(fetched.file, tmp_path / "unpacked")
    data = tmp_path / "unpacked" / "usr/share/games/cataclysm-dda"
    read = game.read_game(data)
    assert len(read.things) > 12_000
    named = 0
    for file in sorted((data / "json" / "monsters").rglob("*.json")):  # names that stand in the file itself
        for entry in json.loads(file.read_text(encoding="utf-8")):
            name = entry.get("name")
            if (
                entry["type"] == "MONSTER"
                and entry.get("id") in read.things
                and isinstance(name, dict)
                and "str" in name
            ):
                named += 1
                assert read.things[entry["id"]].name == name["str"].strip()
    assert named > 500
    assert not [t for t in read.things.values() if "<color" in t.description or "  " in t.description]
    sprites = game.read_sprites(data / "gfx" / things.HELD_OUT_ARTIST, read.things)
    assert len(sprites) == 5537
    assert max(max(image.size) for image in sprites.values()) <= 40
    picture = Pillow.open(io.BytesIO(things.enlarged(sprites["mon_cat"])))
    assert min(picture.size) >= things.SIDE
