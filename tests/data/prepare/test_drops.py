"""Protects what is said of dropped data: samples of texts, missing images apart from none, the list that stays."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import writers
from data.helpers import TOKENIZER, corpus_of
from data.writers import picture

from megatron_lcl.cli import main
from megatron_lcl.curate.run import curate
from megatron_lcl.curate.settings import read_settings
from megatron_lcl.data.corpus.corpus_manifest import read_manifest, write_manifest
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import BAD_KEPT, NAMES_KEPT, SAMPLE_CHARACTERS, SAMPLES_KEPT, Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.pages.inspect import stats, table, write_page
from megatron_lcl.data.prepare.budget import Unusable
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import WORK, Summary, preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

LARGE, ICON = picture(0, 80, 70), picture(1, 16, 16)


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["reason"]: row for row in map(json.loads, (folder / "drops.jsonl").read_text("utf-8").splitlines())}


# --- samples of texts --------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_who_counts() -> None:
    """Drawn from all, not the first; each text once; the same from any division and order."""
    texts = [f"text {k % 60}" for k in range(200)]
    one = Drops()
    for k, text in enumerate(texts):
        one.left_out("text", "hidden", f"page {k:03d}", sample=text)
    samples = one.samples["text: hidden"]
    assert len({text for text, _ in samples}) == SAMPLES_KEPT
    assert samples != [(f"text {k}", f"page {k:03d}") for k in range(SAMPLES_KEPT)]
    assert all(name == f"page {int(text.split()[1]):03d}" for text, name in samples)
    for seed in range(5):
        rng, parts = random.Random(seed), [Drops() for _ in range(7)]
        for k, text in enumerate(texts):
            rng.choice(parts).left_out("text", "hidden", f"page {k:03d}", sample=text)
        rng.shuffle(parts)
        joined = Drops()
        for part in parts:
            joined.add(Drops.from_dict(json.loads(json.dumps(part.to_dict()))))
        assert joined.samples == one.samples


def test_what_is_kept_is_bounded() -> None:
    drops = Drops()
    for k in range(2 * BAD_KEPT):
        drops.bad("document", "not JSON", f"a@{k}", sample=f"{k} \ud800\n" + "word " * 10_000)
        drops.left_out("text", "hidden", f"p{k}")
    (bad, hidden) = drops.rows()
    assert (len(bad["names"]), len(hidden["names"]), bad["count"]) == (BAD_KEPT, NAMES_KEPT, 2 * BAD_KEPT)
    assert len(bad["samples"]) == SAMPLES_KEPT
    assert all(len(s["text"]) <= SAMPLE_CHARACTERS + 6 and "\n" not in s["text"] for s in bad["samples"])
    assert all(len(names) == NAMES_KEPT for names in drops.to_dict(NAMES_KEPT)["names"].values())
    drops.log().decode()


def html(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(LARGE)
    (folder / "icon.png").write_bytes(ICON)
    for k in range(12):
        (folder / f"{k}.html").write_text(
            f"<body><nav>Go to page {k}</nav><p hidden>Unseen {k}</p><div>Beside {k}</div><main><p>All rights reserved "
            f"by us</p><p>Own words of page {k}, and more of them</p><img src=a{k}.png></main>"
        )
        (folder / f"a{k}.png").write_bytes(picture(k + 5, 80, 70))
    (folder / "no-image.html").write_text("<p>A page of words alone")
    (folder / "missing.html").write_text("<p>Words beside a hole<img src=gone.png><img src=icon.png>")
    (folder / "small.html").write_text("<p>Words beside an icon<img src=icon.png>")
    (folder / "empty.html").write_text("")
    return folder


def test_dropped_texts_of_pages_can_be_judged(tmp_path: Path) -> None:
    preprocess("html", html(tmp_path / "in"), tmp_path / "out", tokenizer=TOKENIZER)
    listed = rows(tmp_path / "out")
    for reason, words in (
        ("text: navigation", "Go to page"),
        ("text: hidden", "Unseen"),
        ("text: outside of the page's main part", "Beside"),
    ):
        samples = listed[reason]["samples"]
        assert len(samples) == SAMPLES_KEPT
        assert all(s["text"] == f"{words} {s['name'].removesuffix('.html')}" for s in samples)
    repeated = listed["text: repeated at the edges of many pages"]
    assert (repeated["count"], [s["text"] for s in repeated["samples"]]) == (12, ["All rights reserved by us"])
    for reason, text in (
        ("document: page without images", "A page of words alone"),
        ("document: page whose images are missing", "Words beside a hole"),
        ("document: page whose images were all left out", "Words beside an icon"),
    ):
        assert (listed[reason]["count"], [s["text"] for s in listed[reason]["samples"]]) == (1, [text])
    assert listed["document: empty page"]["count"] == 1
    printed = table(stats(open_corpus(tmp_path / "out")))
    assert "“All rights reserved by us”  (0.html)" in printed
    page = write_page(open_corpus(tmp_path / "out"), tmp_path / "page.html").read_text()
    sample = '<bdi dir="auto">Words beside an icon</bdi><br><cite dir="auto">small.html</cite>'
    assert f"<blockquote>{sample}</blockquote>" in page
    merge([tmp_path / "out"], tmp_path / "merged")
    assert rows(tmp_path / "merged")["text: hidden"]["samples"] == listed["text: hidden"]["samples"]
    assert verify(tmp_path / "out") == []


def test_the_names_of_what_is_bad_stay(tmp_path: Path) -> None:
    """In the lists of merged and curated corpora, whose sources may be gone; the manifests have the first few."""
    reason, names = "", list[str]()
    for part in ("a", "b"):
        documents = [Document((Text(f"{part} {k}"), Image(b"rot" if k < 8 else LARGE))) for k in range(10)]
        writers.write_jsonl(documents, tmp_path / part)
        preprocess("jsonl", tmp_path / part, tmp_path / f"{part}.corpus", tokenizer=TOKENIZER, max_bad_fraction=1)
        found = next(iter(rows(tmp_path / f"{part}.corpus").values()))
        reason, names = found["reason"], [*names, *found["names"]]
    assert len(names) == 16
    curate(tmp_path / "a.corpus", tmp_path / "curated", read_settings(overrides={"text.max_words": "1"}))
    assert rows(tmp_path / "curated")[reason]["names"] == names[:8]
    old = shutil.copytree(tmp_path / "b.corpus", tmp_path / "old")  # an earlier release did not write the list
    (old / "drops.jsonl").unlink()
    manifest = {key: value for key, value in read_manifest(old).items() if key != "fingerprint"}
    del manifest["files"]["drops.jsonl"]
    write_manifest(old, manifest)
    for move, last, kept in ((False, old, 13), (True, tmp_path / "b.corpus", 16)):
        merge([tmp_path / "a.corpus", last], tmp_path / f"merged {move}", move=move)
        assert rows(tmp_path / f"merged {move}")[reason] == {
            "what": "bad", "reason": reason, "count": 16, "names": names[:kept], "samples": []
        }  # fmt: skip
        drops = read_manifest(tmp_path / f"merged {move}")["drops"]
        assert (drops["bad"], drops["names"][reason]) == ({reason: 16}, names[:NAMES_KEPT])
        assert verify(tmp_path / f"merged {move}") == []
    (log := tmp_path / "curated" / "drops.jsonl").write_bytes(b"x" * log.stat().st_size)
    with pytest.raises(UserError, match=r"drops\.jsonl is damaged; `megatron-lcl verify"):
        merge([tmp_path / "curated"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("line", "reason", "sample"),
    [
        (b"{no json", "document: not JSON", "{no json"),
        (b"[1, 2]", "document: not a JSON object", "[1, 2]"),
        (b'{"items": 3, "x": "y"}', 'document: no list "items"', "{'items': 3, 'x': 'y'}"),
        (b'{"items": [{"text": "a", "image": "b"}]}', 'text: an item without one of "text" and "image"', "'b'}"),
        (b'{"items": [], "kind": "odd"}', "document: its kind is none of matched, natural, pairs, captions", "'odd'}"),
    ],
)
def test_dropped_lines_can_be_judged(tmp_path: Path, line: bytes, reason: str, sample: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"items": [{"text": "good"}]}\n' + line + b"\n")
    preprocess("jsonl", tmp_path / "a.jsonl", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    assert rows(tmp_path / "out")[reason]["samples"][0]["text"].endswith(sample)


# --- missing images and no images --------------------------------------------------------------------------------

KEPT = "document: kept without its images, which are missing or bad"
LOST = "document: nothing left, its images are missing or bad"
NOTHING = "document: nothing left"


def jsonl(folder: Path) -> None:
    documents = ([{"text": "a"}], [{"text": "a"}, {"image": "gone"}], [{"text": "a"}, {"image": "bad.png"}],
                 [{"text": "a"}, {"image": "gone"}, {"image": "good.png"}], [{"image": "gone"}], [])  # fmt: skip
    (folder / "bad.png").write_bytes(LARGE[:60])
    (folder / "good.png").write_bytes(LARGE)
    (folder / "a.jsonl").write_text("".join(json.dumps({"items": items}) + "\n" for items in documents))


def mmc4(folder: Path) -> None:
    def info(name: str) -> dict[str, Any]:
        return {"image_name": name, "matched_text_index": 0, "matched_sim": 0.5}

    (folder.parent / "images").mkdir()
    (folder.parent / "images/good.png").write_bytes(LARGE)
    (folder.parent / "images/bad.png").write_bytes(LARGE[:60])
    pages = [(["a"], []), (["a"], ["gone"]), (["a"], ["bad.png"]), (["a"], ["gone", "good.png"]), ([""], ["gone"]),
             ([""], [])]  # fmt: skip
    lines = [json.dumps({"text_list": texts, "image_info": list(map(info, names))}) for texts, names in pages]
    (folder / "docs_shard_0_v2.jsonl").write_text("\n".join(lines))


def obelics(folder: Path) -> None:
    (folder.parent / "images").mkdir()
    (folder.parent / "images/3_1.png").write_bytes(LARGE)
    (folder.parent / "images/2_0.png").write_bytes(LARGE[:60])
    lists = [([None], ["a"]), (["u", None], [None, "a"]), (["u", None], [None, "a"]),
             (["u", "v", None], [None, None, "a"]), (["u"], [None]), ([None], [""])]  # fmt: skip
    made = [{"images": images, "texts": texts} for images, texts in lists]
    schema = pa.schema([("images", pa.list_(pa.string())), ("texts", pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(made, schema=schema), folder / "a.parquet")


@pytest.mark.parametrize(
    ("write", "options"), [(jsonl, {}), (mmc4, {}), (obelics, {"image_name": "{row}_{number}"})]
)  # fmt: skip
def test_missing_images_are_counted_apart_from_none(
    tmp_path: Path, write: Callable[[Path], None], options: dict[str, Any]
) -> None:
    """Documents: text; text and a missing image; and a damaged one; and one of two; a missing image alone; nothing."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    images = tmp_path / "images" if (tmp_path / "images").exists() else None
    summary = preprocess(write.__name__, tmp_path / "in", tmp_path / "out", images=images, tokenizer=TOKENIZER,
                         max_bad_fraction=1, options=options)  # fmt: skip
    assert summary.drops.noted_counts[KEPT] == 2
    assert (summary.drops.bad_counts[LOST], summary.drops.bad_counts[NOTHING]) == (1, 1)
    assert summary.counts["documents"] == 4


def test_missing_images_where_no_document_has_one(tmp_path: Path) -> None:
    """Then texts are written all at once."""
    drops = corpus_of(tmp_path, [{"items": [{"text": "a"}, {"image": "gone"}]}, {"items": [{"text": "b"}]}], {}).drops
    assert drops.noted_counts == {KEPT: 1}


@pytest.mark.parametrize("format", ["webdataset", "mint1t"])
def test_missing_images_in_tars(tmp_path: Path, format: str) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/0.tar", "w") as archive:
        if format == "webdataset":
            writers._add(archive, "0.txt", b"a")
            writers._add(archive, "1.json", b"{}")
            expected = {KEPT: 1, LOST: 1, "document: no caption": 1}
        else:
            for key, (texts, images) in enumerate(([["a"], [None]], [["a", None], [None, "u"]], [[None], ["u"]])):
                writers._add(archive, f"{key}.json", json.dumps({"texts": texts, "images": images}).encode())
            expected = {KEPT: 1, LOST: 1}
    drops = preprocess(format, tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1).drops
    counts = {**drops.noted_counts, **drops.bad_counts}
    assert {reason: counts[reason] for reason in expected} == expected
    assert NOTHING not in counts


def test_a_page_kept_without_its_images(tmp_path: Path) -> None:
    folder = html(tmp_path / "in")
    summary = preprocess("html", folder, tmp_path / "out", tokenizer=TOKENIZER, options={"text_pages": True})
    assert summary.drops.noted_counts == {KEPT: 1}
    assert {reason for reason in summary.drops.left_out_counts if reason[:3] == "doc"} == {"document: empty page"}


# --- the list that stays -----------------------------------------------------------------------------------------


def lines(folder: Path, num_bad: int = 12) -> Path:
    folder.mkdir()
    good = [Document((Text(f"text {k}"), Image(picture(k)))) for k in range(20)]
    writers.write_jsonl(good, folder)
    with open(folder / "documents.jsonl", "a") as file:
        file.write("".join(f"bad line {k}\n" for k in range(num_bad)))
    return folder


def test_too_much_that_is_bad_leaves_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(tmp_path / "in")
    command = ["preprocess", "--format", "jsonl", "--input", str(tmp_path / "in"), "--tokenizer", "clip",
               "--output", str(tmp_path / "new/out")]  # fmt: skip
    assert main(command) == 2
    file = tmp_path / "new/out/drops.jsonl"
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("megatron-lcl preprocess: 12 of 32 documents are bad, 38%: mostly document: not JSON, 12")
    assert "allow more than 0.2 with --max-bad-fraction" in error
    assert str(file) in error
    assert [p for p in (tmp_path / "new").rglob("*") if p.is_file()] == [file]
    (row,) = rows(file.parent).values()
    assert (row["count"], len(row["names"]), len(row["samples"])) == (12, 12, SAMPLES_KEPT)  # all of them, to be mended
    assert row["samples"][0]["text"].startswith("bad line")
    assert main([*command, "--max-bad-fraction", "0.5"]) == 0  # the list is not in the way
    assert verify(file.parent) == []
    assert rows(file.parent)["document: not JSON"]["names"] == row["names"]


@pytest.mark.parametrize("options", [{}, {"held_out": "held"}, {"tokenizer": TOKENIZER}])
def test_nothing_usable_leaves_the_list(tmp_path: Path, options: dict[str, Any]) -> None:
    """Whatever reads the documents first: the hold-out, the tokenizer, or the tasks."""
    (tmp_path / "a.jsonl").write_text("bad\n" * 3)
    if "held_out" in options:
        options = {"held_out": tmp_path / options["held_out"]}
    with pytest.raises(Unusable, match=r"no usable document: .*\(e\.g\. a\.jsonl:1\).*drops\.jsonl"):
        preprocess("jsonl", tmp_path / "a.jsonl", tmp_path / "out", max_bad_fraction=1, **options)
    assert rows(tmp_path / "out")["document: not JSON"]["count"] == 3
    assert not (tmp_path / "held").exists()


def test_the_list_of_a_job_leaves_the_others_work(tmp_path: Path) -> None:
    folder = lines(tmp_path / "in", 0)
    (folder / "z.jsonl").write_text("bad\n" * 30)

    def run(job: int, **options: Any) -> Summary:
        return preprocess("jsonl", folder, tmp_path / "out", tokenizer=TOKENIZER, task_bytes=1, job=(job, 2), **options)

    run(0)
    with pytest.raises(Unusable, match="30 of 50"):
        run(1)
    assert rows(tmp_path / "out")["document: not JSON"]["count"] == 30
    assert list((tmp_path / "out" / WORK).glob("part-000000-*"))
    assert run(1, max_bad_fraction=1).counts["documents"] == 20


def test_a_finished_corpus_keeps_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its held-out half is made again, and fails: the list goes there."""
    folder = lines(tmp_path / "in", 3)
    arguments: dict[str, Any] = {"tokenizer": TOKENIZER, "held_out": tmp_path / "held"}
    preprocess("jsonl", folder, tmp_path / "out", **arguments)
    before = (tmp_path / "out/drops.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "held")
    monkeypatch.setattr("megatron_lcl.data.prepare.preprocess.finish", fail)
    with pytest.raises(Unusable, match=r"held/drops\.jsonl"):
        preprocess("jsonl", folder, tmp_path / "out", **arguments)
    assert (tmp_path / "out/drops.jsonl").read_bytes() == before
    assert verify(tmp_path / "out") == []


def fail(*_arguments: Any) -> None:
    drops = Drops()
    drops.bad("image", "planted")
    raise Unusable("too much", drops)
