"""Protects `demo emoji`: which drawing is which emoji, its pixels, and what the command leaves, byte for byte."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from demo.test_packages import npm_package
from PIL import Image as Pillow

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.demo import emoji
from megatron_lcl.demo.emoji import Aliases, plain_name, rasterize, read_emoji, svg
from megatron_lcl.demo.packages import fetch, read_npm
from megatron_lcl.evaluate.sources import open_images

pytest.importorskip("resvg_py")
LABELS = [
    "grinning face",
    "dog",
    "cat",
    "cow",
    "pig",
    "goat",
    "camel",
    "red apple",
    "pear",
    "peach",
    "cherries",
    "kiwi",
]
"""two subgroups of animals and food, and a face"""
CODES = [f"1F6{k:02X}" for k in range(len(LABELS))]
GROUPS = {
    "groups": [
        {"key": "smileys-emotion", "message": "smileys & emotion", "order": 0},
        {"key": "component", "message": "components", "order": 2},
        {"key": "animals-nature", "message": "animals & nature", "order": 3},
    ],
    "subgroups": [
        {"message": "smiling", "order": 0},
        {"message": "mammals", "order": 1},
        {"message": "fruit", "order": 2},
    ],
}


def entry(k: int) -> dict[str, Any]:
    """As `en/data.json` has it."""
    group, subgroup = (0, 0) if k == 0 else (3, 1) if k < 7 else (3, 2)
    return {"label": LABELS[k], "hexcode": f"{CODES[k]}-FE0F", "order": 100 - k, "group": group, "subgroup": subgroup,
            "tags": [LABELS[k], f"tag{k}", "thing"]}  # fmt: skip


def bits_of(artist: int, k: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{artist} {k}".encode())


def body(artist: int, k: int) -> str:
    """A drawing of 48 x 48 units, bits of artist and emoji as squares."""
    bits = bits_of(artist, k)
    squares = (
        f'<path d="M{x * 12} {y * 12}h12v12h-12z"/>' for x in range(4) for y in range(4) if bits >> (4 * x + y) & 1
    )
    return f'<g fill="#{bits % 0x1000000:06x}">{"".join(squares)}</g>'


def write_packages(folder: Path) -> None:
    """All nine packages in the real formats, with a dozen emoji."""
    data = [entry(k) for k in range(len(LABELS))]
    data += [{"label": "regional indicator A", "hexcode": "1F1E6"}]
    data += [{"label": "red hair", "hexcode": "1F9B0", "order": 9, "group": 2, "subgroup": 1}]
    shortcodes = {
        f"en/shortcodes/{name}.json": b"{}" for name in ("emojibase", "cldr", "github", "iamcal", "joypixels")
    }
    shortcodes["en/shortcodes/github.json"] = json.dumps({CODES[3]: ["moo", "cow_face"]}).encode()
    npm_package(
        folder / "emojibase-data-99.0.0.tgz",
        "99.0.0",
        **{"en/data.json": json.dumps(data).encode(), "en/messages.json": json.dumps(GROUPS).encode()},
        **{"meta/unicode-names.json": json.dumps({CODES[4]: "PIG FACE"}).encode(), "LICENSE": b"Be nice.\n"},
        **shortcodes,
    )
    for number, artist in enumerate(emoji.DRAWINGS):
        names = [label.replace(" ", "-") for label in LABELS]
        with_codes = artist in ("noto", "twemoji")
        icons: dict[str, Any] = {"prefix": artist, "width": 48, "height": 48}
        icons["icons"] = {name: {"body": body(number, k)} for k, name in enumerate(names)}
        icons["icons"]["a-logo"] = {"body": body(number, 99)}  # of no emoji
        if not with_codes:  # names of other years
            for old, new in (("cow", "moo"), ("pig", "pigface"), ("kiwi", "kiwifruit")):
                icons["icons"][new] = icons["icons"].pop(old)
        else:
            icons["aliases"] = {"kiwi-fruit": {"parent": "kiwi"}}
        chars = {code.lower(): name for code, name in zip(CODES, names, strict=True)} if with_codes else {}
        info = {"name": artist.title(), "author": {"name": f"Studio {number}", "url": "example.org/studio"},
                "license": {"spdx": "CC-BY-4.0", "url": "example.org/license"}}  # fmt: skip
        npm_package(
            folder / f"iconify-json-{artist}-99.0.0.tgz",
            "99.0.0",
            **{f"{n}.json": json.dumps(c).encode() for n, c in (("icons", icons), ("chars", chars), ("info", info))},
        )


@pytest.fixture(scope="module")
def made(once: Callable[..., Any]) -> Path:
    """The folder that `demo emoji --from` leaves."""

    def make(folder: Path) -> Path:
        write_packages(folder / "packages")
        assert main(["demo", "emoji", "--from", str(folder / "packages"), "--output", str(folder / "out")]) == 0
        return folder / "out"

    return once("demo-emoji", make)


def test_a_drawing_has_its_name_in_whatever_year(made: Path) -> None:
    counts = json.loads((made / "sources.json").read_text())["counts"]
    assert counts["artists"] == {artist: len(LABELS) for artist in sorted(emoji.DRAWINGS)}
    for artist in ("noto", "fxemoji"):  # with and without code points
        number = list(emoji.DRAWINGS).index(artist)
        for k, code in enumerate(CODES):
            file = made / "documents" / "pictures" / artist / f"{code.lower()}.png"
            image = Pillow.open(file)
            assert image.size == (72, 72)
            drawn = [
                bool(image.getpixel((18 * x + 9, 18 * y + 9))[3])
                for x in range(4)
                for y in range(4)  # type: ignore[index]
            ]
            assert drawn == [bool(bits_of(number, k) >> (4 * x + y) & 1) for x in range(4) for y in range(4)]


def test_documents_hold_the_artists_that_are_trained_on(made: Path) -> None:
    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (made / "documents" / f"{name}.jsonl").read_text().splitlines()]

    def images(name: str) -> Counter[str]:
        return Counter(item["image"] for line in lines(name) for item in line["items"] if "image" in item)

    labels = images("labels")
    assert set(labels.values()) == {1}
    assert images("contexts") == images("pairs") == labels
    assert not [file for file in labels if "twemoji" in file]
    held_out = images("heldout")
    assert len([file for file in held_out if "twemoji" in file]) == len(LABELS)
    assert not labels.keys() & held_out.keys()
    for line in lines("labels"):
        artists = {item["image"].split("/")[1] for item in line["items"] if "image" in item}
        assert len(artists) == 1
    texts = {item["text"] for line in lines("labels") for item in line["items"] if "text" in item}
    assert "animals & nature: mammals" in texts
    assert "tag1, thing" in texts  # the label itself is no tag
    for name in ("labels", "contexts", "pairs", "heldout"):
        corpus = open_corpus(made / "corpora" / name)
        assert verify(made / "corpora" / name) == []
        assert len(corpus) == len(lines(name))
        assert corpus.manifest["source"]["license"] == "CC-BY-4.0 AND MIT"
        assert set(corpus.kinds) == {"pairs" if name == "pairs" else "natural"}
    assert len({open_corpus(made / "corpora" / n).tokenizer.fingerprint for n in ("labels", "pairs", "heldout")}) == 1


def test_evaluation_reads_the_labeled_pictures(made: Path) -> None:
    artist = open_images(made / "evaluate" / "artist")
    trained = {json.loads(line)["items"][0]["text"].split(":")[0] for line in open_pairs(made)}
    assert set(artist.classes) == trained
    assert artist.templates == ("{c}",)
    for blob, label in zip(artist.images, artist.need_labels(), strict=True):
        code = CODES[LABELS.index(artist.classes[label])].lower()
        assert blob.read() == (made / "documents" / "pictures" / "twemoji" / f"{code}.png").read_bytes()
    distinct = open_images(made / "evaluate" / "artist-distinct", "train")
    assert len(distinct) == len(trained) * 7
    kinds = {split: open_images(made / "evaluate" / "kinds", split) for split in ("train", "test")}
    assert kinds["train"].classes == kinds["test"].classes == ("animals & nature", "smileys & emotion")
    assert len(kinds["train"]) == len(trained) * 7
    faces = 1 if LABELS[0] in trained else 0
    assert Counter(kinds["train"].need_labels())[1] == 7 * faces


def open_pairs(made: Path) -> list[str]:
    return (made / "documents" / "pairs.jsonl").read_text().splitlines()


def test_licenses_and_sources(made: Path) -> None:
    text = (made / "LICENSES").read_text()
    for artist in emoji.DRAWINGS:
        assert f"@iconify-json/{artist} 99.0.0: CC-BY-4.0" in text
    assert "Noto by Studio 4 (example.org/studio)." in text
    assert "  Be nice." in text
    sources = json.loads((made / "sources.json").read_text())
    assert [source["package"] for source in sources["packages"]] == [package.name for package in emoji.PACKAGES]


def test_bytes_are_the_same_again(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = str(made.parent / "packages")
    assert main(["demo", "emoji", "--from", given, "--output", str(tmp_path / "again")]) == 0
    first, again = (
        {str(f.relative_to(folder)): f.read_bytes() for folder in (path,) for f in folder.rglob("*") if f.is_file()}
        for path in (made, tmp_path / "again")
    )
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []
    capsys.readouterr()
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    assert main(["demo", "emoji", "--from", given, "--output", str(made)]) == 0
    assert "96 pictures of 12 names by 8 artists" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before
    write_packages(tmp_path / "changed")
    npm_package(tmp_path / "changed" / "iconify-json-noto-99.0.0.tgz", "99.0.1")
    assert main(["demo", "emoji", "--from", str(tmp_path / "changed"), "--output", str(made)]) == 2
    assert "was made of other packages" in capsys.readouterr().err


def test_mirrored_turned_and_oblong_icons() -> None:
    icons = {
        "width": 40, "height": 20,
        "icons": {"one": {"body": '<path fill="#f00" d="M0 0h10v10z"/><path fill="#00f" d="M30 15h6v5z"/>'}},
        "aliases": {
            "mirrored": {"parent": "one", "hFlip": True}, "upside": {"parent": "one", "vFlip": True},
            "turned": {"parent": "one", "rotate": 1}, "back": {"parent": "mirrored", "hFlip": True},
            "half": {"parent": "turned", "rotate": 1},
        },
    }  # fmt: skip
    names = ["one", "mirrored", "upside", "turned", "back", "half"]
    images = [Pillow.open(io.BytesIO(png)) for png in rasterize([svg(icons, name) for name in names], 1)]
    assert {image.size for image in images} == {(72, 72)}
    one, mirrored, upside, turned, back, half = (image.convert("RGBA") for image in images)
    turn = Pillow.Transpose

    def close(a: Pillow.Image, b: Pillow.Image) -> bool:
        difference = np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()
        assert not 1 < difference < 5  # edges are smoothed, and not alike from left and right
        return difference <= 1

    assert not close(one, mirrored)
    assert close(mirrored, one.transpose(turn.FLIP_LEFT_RIGHT))
    assert close(upside, one.transpose(turn.FLIP_TOP_BOTTOM))
    assert close(turned, one.transpose(turn.ROTATE_270))  # Pillow turns the other way
    assert close(half, one.transpose(turn.ROTATE_180))
    assert close(back, one)
    assert one.getpixel((14, 22))[3] == 255  # type: ignore[index]
    assert one.getpixel((40, 10))[3] == 0  # type: ignore[index]


def test_without_resvg_the_message_says_what_to_install(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    given = str(made.parent / "packages")
    assert main(["demo", "emoji", "--from", given, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`pip install 'megatron-lcl[demo]'`" in line


def test_plain_names() -> None:
    assert plain_name("Côte d’Ivoire") == plain_name("cote-d-ivoire") == "cotedivoire"


@pytest.mark.slow
def test_real_packages(tmp_path: Path) -> None:
    """Where npm's registry is in reach: the recorded hashes, and that names alone find the same as code points do."""
    packages = (emoji.NAMES, emoji.DRAWINGS["fxemoji"], emoji.DRAWINGS["twemoji"])
    try:
        fetched = {f.package.name: f for f in fetch(packages, tmp_path)}
    except ValueError as error:
        pytest.skip(str(error))
    assert all(f.is_recorded for f in fetched.values())
    names = read_npm(fetched["emojibase-data"].file, [
        "en/data.json", "en/messages.json", "meta/unicode-names.json",
        *(f"en/shortcodes/{n}.json" for n in ("emojibase", "cldr", "github", "iamcal", "joypixels")),
    ])  # fmt: skip
    data = json.loads(names["en/data.json"])
    known = read_emoji(data, json.loads(names["en/messages.json"]))
    assert len(known) == len([e for e in data if e.get("group", 2) != 2]) == 1914
    assert len({e.label for e in known.values()}) == 1914
    icons, chars = {}, {}
    for artist in ("fxemoji", "twemoji"):
        files = read_npm(fetched[f"@iconify-json/{artist}"].file, ["icons.json", "chars.json"])
        icons[artist], chars[artist] = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    aliases = Aliases(known, icons, chars, names)
    by_names = aliases.icons_of("fxemoji")
    assert len(aliases.icons_of("twemoji")) == 1914
    assert len(by_names) > 600
    # twemoji's code points are the truth; its icons found by their names alone are the same ones
    without = Aliases(known, {"twemoji": icons["twemoji"]}, {"twemoji": {}}, names).icons_of("twemoji")
    truth = {icon: code for code, icon in aliases.icons_of("twemoji").items()}
    found = {icon: code for code, icon in without.items() if icon in truth}
    assert len(found) > 1500
    assert {icon: code for icon, code in found.items() if truth[icon] != code} == {}
    some = list(by_names.values())[::20]
    images = [Pillow.open(io.BytesIO(png)) for png in rasterize([svg(icons["fxemoji"], icon) for icon in some], 1)]
    assert {image.size for image in images} == {(72, 72)}
    assert all(image.getchannel("A").getextrema() != (0, 0) for image in images)
