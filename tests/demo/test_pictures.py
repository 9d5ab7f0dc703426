"""Protects the split: what counts as a near-duplicate, who is held out, and how runs and documents are made."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.helpers import TOKENIZER
from PIL import Image as Pillow
from PIL import ImageDraw

from megatron_lcl.data.corpus.perceptual_hash import perceptual_hash
from megatron_lcl.demo import documents
from megatron_lcl.demo import write as write_module
from megatron_lcl.demo.pictures import MAX_BITS, Picture, near_duplicates
from megatron_lcl.demo.split import split


def drawing(seed: int, shift: int = 0, color: str = "navy") -> bytes:
    """Shapes drawn by a seed, all of them moved by `shift` pixels."""
    rng = np.random.default_rng(seed)
    image = Pillow.new("RGBA", (72, 72))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, width, height = (int(v) for v in rng.integers(4, 40, 4))
        draw.rectangle((x + shift, y, x + width + shift, y + height), fill=color)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def picture(artist: str, name: str, data: bytes, topic: str = "shapes", about: str = "few words") -> Picture:
    return Picture(artist, name, about, "shape", topic, f"pictures/{artist}/{name}.png", data)


def test_redrawn_and_copied_pictures_are_near_duplicates() -> None:
    names = [f"name {k}" for k in range(8)]
    training = [picture("a", name, drawing(k)) for k, name in enumerate(names)]
    redrawn = [picture("b", name, drawing(k, shift=1, color="teal")) for k, name in enumerate(names)]
    other = [picture("b", name, drawing(100 + k)) for k, name in enumerate(names)]
    copied = [picture("b", f"other {k}", drawing(k)) for k in range(8)]
    recolored = [picture("b", f"other {k}", drawing(k, color="gold")) for k in range(8)]
    held_out = [*redrawn, *other, *copied, *recolored]
    bits = perceptual_hash(Pillow.open(io.BytesIO(redrawn[0].data)).convert("RGB"))
    assert (bits != perceptual_hash(Pillow.open(io.BytesIO(training[0].data)).convert("RGB"))).sum() <= MAX_BITS
    assert near_duplicates(held_out, training) == [*range(8), *range(16, 24)]
    assert near_duplicates(held_out, []) == []


def test_files_are_on_the_disk_before_the_sources_say_that_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they may be empty after a power failure, and the data set is taken for whole all the same."""
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(write_module, "replace_text", lambda file, text: done.append(f"{file} written"))
    monkeypatch.setattr(write_module, "preprocess", lambda *_, **__: "")
    pictures = [picture(artist, f"name {k}", drawing(k)) for artist in "ab" for k in range(3)]
    data = write_module.DataSet("set", pictures, [], "a", 0.0, 1, 8)
    write_module.write(data, [], tmp_path / "out", learn=lambda texts: TOKENIZER)
    done.remove(f"{tmp_path}/out/LICENSES written")  # which `replace_text` syncs
    assert sorted(done[:-1]) == sorted(map(str, (tmp_path / "out", *(tmp_path / "out").rglob("*"))))
    assert done[-1] == f"{tmp_path}/out/sources.json written"


def test_an_artist_and_a_share_of_the_names_are_held_out() -> None:
    pictures = [
        picture(artist, f"name {k}", drawing(7 * k + number))
        for number, artist in enumerate("abc")
        for k in range(200)
        if (artist, k) != ("c", 3)
    ]
    parts = split(pictures, "a", 0.1)
    assert sorted(p.key for p in (*parts.training, *parts.held_out)) == sorted(p.key for p in pictures)
    assert {p.artist for p in parts.training} == {"b", "c"}
    trained = {p.name for p in parts.training}
    held = {f"name {k}" for k in range(200)} - trained
    assert 10 <= len(held) <= 30
    assert {p.name for p in parts.held_out if p.artist != "a"} == held  # of no artist is such a name trained on
    sets = parts.sets()
    assert {p.name for p in sets["names"]} == held
    assert {p.name for p in sets["artist"]} == trained
    assert {p.artist for p in sets["artist"]} == {"a"}
    for name in ("artist", "names"):
        assert sets[f"{name}-distinct"] == [p for p in sets[name] if p.key not in parts.near]


def test_a_picture_that_stands_for_two_names_is_asked_for_neither() -> None:
    pictures = [picture("a", f"name {k}", drawing(k // 2 if k < 4 else k)) for k in range(8)]
    pictures += [picture("b", f"name {k}", drawing(50 + k)) for k in range(8)]
    asked = split(pictures, "a", 0.0).sets()["artist"]
    assert [p.name for p in asked] == ["name 4", "name 5", "name 6", "name 7"]


def test_runs_have_three_to_seven_pictures_of_one_topic() -> None:
    sizes = {"one": 1, "two": 2, "seven": 7, "eight": 8, "many": 100}
    pictures = [
        picture(artist, f"{topic} {k}", f"{artist}{topic}{k}".encode(), topic)
        for artist in "ab"
        for topic, size in sizes.items()
        for k in range(size)
    ]
    runs = list(documents.runs(pictures, "labels"))
    assert Counter(p.key for run in runs for p in run) == Counter(p.key for p in pictures)
    assert all(len({(p.artist, p.topic) for p in run}) == 1 for run in runs)
    lengths = Counter(len(run) for run in runs if run[0].topic in ("seven", "eight", "many"))
    assert set(lengths) == {3, 4, 5, 6, 7}
    assert runs == list(documents.runs(pictures, "labels"))
    assert runs != list(documents.runs(pictures, "contexts"))
    long = [picture("a", f"name {k}", bytes([k]), about="word " * 50) for k in range(12)]
    assert {len(run) for run in documents.runs(long, "labels", max_words=120)} <= {1, 2}
    same = [picture("a", f"name {k}", b"same") for k in range(5)]
    assert [len(run) for run in documents.runs(same, "labels")] == [1]


def test_what_stands_before_each_picture() -> None:
    pictures = [picture("a", f"name {k}", bytes([k]), about=f"like {k}") for k in range(60)]
    seen = set()
    for run in documents.runs(pictures, "any"):
        labels, contexts = (make(run) for make in (documents.labels, documents.contexts))
        items = labels["items"]
        before = [items[k - 1]["text"] for k, item in enumerate(items) if "image" in item]
        assert before == [p.name for p in run]
        items = contexts["items"]
        assert items[0] == {"text": "shapes"}
        places = [k for k, item in enumerate(items) if "image" in item]
        assert [items[k]["image"] for k in places] == [p.file for p in run]
        if "In this order" in items[1]["text"]:
            assert items[1]["text"] == f"In this order: {'; '.join(p.name for p in run)}."
            assert places == list(range(2, len(items)))
            seen.add("list")
        else:
            assert [items[k - 1]["text"] for k in places] == [p.about for p in run]
            assert [items[k + 1]["text"] for k in places] == [p.name for p in run]
            seen.add("description")
        seen.add(len(labels["items"]) % 3)  # with a title, and without
    assert seen == {"list", "description", 0, 1}
    pairs = [documents.pair(p) for p in pictures]
    assert {record["kind"] for record in pairs} == {"pairs"}
    texts = [record["items"][0]["text"] for record in pairs]
    assert all(text in (p.name, f"{p.name}: {p.about}") for text, p in zip(texts, pictures, strict=True))
    assert 15 < sum(":" in text for text in texts) < 45
