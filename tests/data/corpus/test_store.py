"""Protects the corpus format: byte for byte Megatron-Core's, and planted damage is found; the corpus commands."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from data import writers
from data.corpus.conftest import DOCUMENTS
from data.helpers import TOKENIZER, plain
from data.writers import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import html

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.corpus_manifest import write_manifest
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import ShardWriter, open_corpus
from megatron_lcl.data.engines import Engine
from megatron_lcl.data.pages.inspect import show, stats, table, write_page
from megatron_lcl.data.prepare import jobs
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import Summary, preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError


def test_documents_come_back(corpus: Path) -> None:
    opened = open_corpus(corpus)
    assert len(opened) == 4
    assert plain(opened[:]) == plain(DOCUMENTS)
    assert plain([opened[-1], pickle.loads(pickle.dumps(opened))[1]]) == plain([DOCUMENTS[3], DOCUMENTS[1]])
    assert plain([opened[np.int64(1)]]) == plain([DOCUMENTS[1]])
    with pytest.raises(IndexError):
        opened[4]
    for index in (2.7, "3", None):
        with pytest.raises(TypeError):
            opened[index]
        with pytest.raises(TypeError):
            opened.name(index)  # type: ignore[arg-type]


def test_a_similarity_of_zero_is_one(tmp_path: Path) -> None:
    """Not none: images of unknown similarity pass every threshold."""
    images = [Image(picture(k), "", similarity, 0) for k, similarity in enumerate((0.0, None, -0.25))]
    writers.write_jsonl([Document((*images, Text("a")))], tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER)
    (back,) = open_corpus(tmp_path / "out")
    assert [image.similarity for image in back.images] == [0.0, None, -0.25]


def test_arrays(corpus: Path) -> None:
    shard = open_corpus(corpus).shard(0)
    assert shard.modes.tolist() == [0, 1, 0, 1, 1, 0, 0, 1, 0, 1]
    assert shard.document_offsets.tolist() == [0, 3, 5, 6, 10]
    assert shard.matched_text.tolist() == [-1, -1, -1, 1, 0]
    np.testing.assert_array_equal(shard.similarity, np.array([np.nan, np.nan, np.nan, 0.25, 0.5], np.float32))
    assert [shard.piece(k) for k in (1, 3, 4, 7, 9)] == [0, 1, 0, 2, 1]
    assert (shard.image_width == 40).all()
    assert (shard.image_height == 30).all()
    assert shard.placement_of[[1, 3, 4, 7, 9]].tolist() == [0, 1, 2, 3, 4]
    assert (shard.lengths.dtype, shard.modes.dtype, shard.document_offsets.dtype) == (np.int32, np.int8, np.int64)
    with pytest.raises(ValueError, match="read-only"):
        shard.lengths[0] = 1


def test_megatron_core_reads_it(corpus: Path) -> None:
    dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDataset
    ours = open_corpus(corpus).shard(0)
    tokens, images = (dataset(str(corpus / f"{kind}-00000"), multimodal=True) for kind in ("tokens", "images"))
    assert len(tokens) == ours.num_pieces
    np.testing.assert_array_equal(tokens.document_indices, ours.document_offsets)
    for k in range(len(tokens)):
        sequence, mode = tokens[k]
        assert mode == ours.modes[k]
        np.testing.assert_array_equal(sequence, np.atleast_1d(ours.piece(k)))
    for j in range(len(images)):
        assert images[j][0].tobytes() == bytes(ours.image(j))


def test_pyarrow_reads_what_is_known_of_images(corpus: Path) -> None:
    """As docs/corpus-format.md says it; other formats may only be appended, or old corpora would name others."""
    with pa.ipc.open_file(corpus / "images-00000.arrow") as file:
        assert (file.num_record_batches, file.get_batch(0).num_rows) == (1, 1)
        table = file.read_all()
    known = [pa.field("width", pa.int32()), pa.field("height", pa.int32()), pa.field("format", pa.int8())]
    image = pa.struct([*known, pa.field("xxh3", pa.binary(16))])
    placement = pa.struct([pa.field("similarity", pa.float32()), pa.field("matched_text", pa.int32())])
    assert table.schema.names == ["images", "placements"]
    assert table.schema.types == [pa.large_list(image), pa.large_list(placement)]
    assert table.schema.metadata == {b"formats": b"?,JPEG,PNG,WEBP,GIF,AVIF,TIFF,BMP,PPM,ICO,JPEG2000,MPO"}
    images, shard = table["images"][0].as_py(), open_corpus(corpus).shard(0)
    digests = [xxhash.xxh3_128_digest(bytes(shard.image(j))) for j in range(shard.num_images)]
    assert images == [{"width": 40, "height": 30, "format": 2, "xxh3": digest} for digest in digests]
    assert [each["matched_text"] for each in table["placements"][0].as_py()] == [-1, -1, -1, 1, 0]


FORMATS = "?,JPEG,PNG,WEBP,GIF,AVIF,TIFF,BMP,PPM,ICO,JPEG2000,MPO"


def write_formats(corpus: Path, formats: str | None, number: int = 2) -> None:
    """As if the first image had this format, of such a list (None: of none)."""
    file = corpus / "images-00000.arrow"
    with pa.ipc.open_file(file.read_bytes()) as opened:
        images, placements = opened.get_batch(0).columns
    fields = images.values.flatten()
    fields[2] = pa.array([number, *fields[2].to_pylist()[1:]], pa.int8())
    changed = pa.StructArray.from_arrays(fields, fields=list(images.type.value_type))
    batch = pa.record_batch(
        {"images": pa.LargeListArray.from_arrays(images.offsets, changed), "placements": placements},
        metadata=None if formats is None else {"formats": formats},
    )
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    forge(corpus)


@pytest.mark.parametrize(
    ("formats", "number", "said"),
    [
        ("JPEG,PNG", 2, r"is damaged: its `formats` are 'JPEG,PNG', not '\?,JPEG,.*MPO' \(docs/corpus-format.md\)"),
        ("?,PNG,JPEG", 2, "is damaged: its `formats` are"),
        (None, 2, "is damaged: its `formats` are"),
        (
            f"{FORMATS},HEIF,JXL",
            12,
            r"was written by a later release, .* formats of images \(HEIF, JXL\); read it with",
        ),
        ("?,JPEG", 2, "is damaged: image 0 has the format 2, and its 2 `formats` begin with 0"),
        (FORMATS, 12, "is damaged: image 0 has the format 12"),
        (FORMATS, -1, "is damaged: image 0 has the format -1"),
    ],
)
def test_a_shard_with_formats_of_its_own_is_refused(corpus: Path, formats: str | None, number: int, said: str) -> None:
    """Their numbers would be taken for others'; an earlier list, which ends sooner, has the same."""
    write_formats(corpus, formats, number)
    with pytest.raises(UserError, match=f"images-00000.arrow {said}"):
        open_corpus(corpus).shard(0)
    assert any(re.search(said, fault) for fault in verify(corpus))
    write_formats(corpus, "?,JPEG,PNG,WEBP")
    assert open_corpus(corpus)[0].images[0].data == DOCUMENTS[0].images[0].data
    assert not verify(corpus)


pieces = st.one_of(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5), st.binary(min_size=1, max_size=9))


@settings(max_examples=30)
@given(st.lists(st.lists(pieces, min_size=1, max_size=4), max_size=5))
def test_byte_for_byte_as_megatron_core_writes(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int] | bytes]]
) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    folder = tmp_path_factory.mktemp("bytes")
    writer = ShardWriter(folder, 0)
    builder = module.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.int32, multimodal=True)
    images = module.IndexedDatasetBuilder(str(folder / "their images.bin"), dtype=np.uint8, multimodal=True)
    seen: list[bytes] = []
    for document in documents:
        for piece in document:
            if isinstance(piece, bytes):
                writer.add_image(piece, 1, 1, "PNG")
                if piece not in seen:
                    seen.append(piece)
                    images.add_item(torch.tensor(list(piece), dtype=torch.uint8), mode=1)
                    images.end_document()
                builder.add_item(torch.tensor([seen.index(piece)]), mode=1)
            else:
                writer.add_texts([np.array(piece, np.int32).tobytes()])
                builder.add_item(torch.tensor(piece), mode=0)
        writer.end_document()
        builder.end_document()
    writer.finish()
    builder.finalize(str(folder / "theirs.idx"))
    images.finalize(str(folder / "their images.idx"))
    for ours, theirs in (("tokens-00000", "theirs"), ("images-00000", "their images")):
        for suffix in ("bin", "idx"):
            assert (folder / f"{ours}.{suffix}").read_bytes() == (folder / f"{theirs}.{suffix}").read_bytes()
    shard = Shard(folder, 0)
    assert [bytes(shard.image(j)) for j in range(shard.num_images)] == seen


# --- verify: every planted fault is found ------------------------------------------------------------------------


def flip(name: str, offset: int, value: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        start = offset % len(raw)
        raw[start : start + len(value)] = value
        (folder / name).write_bytes(raw)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-3])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def forge(folder: Path) -> None:
    """Make the manifest agree with the damaged files, so that only their content gives them away."""
    import xxhash

    manifest = json.loads((folder / "corpus.json").read_text())
    for name in manifest["files"]:
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(raw), "xxh3": xxhash.xxh3_128_hexdigest(raw)}
    write_manifest(folder, manifest)


def test_documents_prepared_again_have_the_same_fingerprint(corpus: Path, tmp_path: Path) -> None:
    """At another time and place, and after a merge; not other documents, nor the same in another order."""
    first, recipe = open_corpus(corpus).fingerprint, open_corpus(corpus).manifest["recipe"]
    seen = set()
    for name, documents in {"same": DOCUMENTS, "fewer": DOCUMENTS[1:], "order": DOCUMENTS[::-1]}.items():
        writers.write_jsonl(documents, tmp_path / f"{name}-in")
        os.utime(tmp_path / f"{name}-in" / "documents.jsonl", (1, 1))
        preprocess("jsonl", tmp_path / f"{name}-in", tmp_path / name, tokenizer=TOKENIZER)
        again = open_corpus(tmp_path / name)
        assert again.manifest["recipe"] != recipe
        assert (again.fingerprint == first) == (name == "same")
        seen.add(again.fingerprint)
    assert len(seen) == 3
    merge([tmp_path / "same"], tmp_path / "merged")
    assert open_corpus(tmp_path / "merged").fingerprint == first


def test_contents_that_are_not_those_of_the_files(corpus: Path) -> None:
    manifest = json.loads((corpus / "corpus.json").read_text())
    for wrong, fault in {"0" * 32: "`contents` are not those", "no number": "is damaged"}.items():
        (corpus / "corpus.json").write_text(json.dumps({**manifest, "contents": wrong}))
        assert fault in " ".join(verify(corpus, quick=True))


def test_a_good_corpus_verifies(corpus: Path) -> None:
    assert verify(corpus) == []
    assert verify(corpus, quick=True) == []


NAMES = ("tokens-00000.bin", "tokens-00000.idx", "images-00000.bin", "images-00000.idx", "images-00000.arrow")


@pytest.mark.parametrize("name", [*NAMES, "tokenizer.model"])
@pytest.mark.parametrize("damage", [cut, remove, lambda name: flip(name, -9, b"\x55\xaa")])
def test_verify_finds_damaged_files(corpus: Path, name: str, damage: Callable[[str], Callable[[Path], None]]) -> None:
    damage(name)(corpus)
    assert any(name in fault for fault in verify(corpus, quick=True))


INDEX = 34  # bytes of header; then 10 int32 lengths, 10 int64 pointers, 5 int64 documents, 10 int8 modes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip("tokens-00000.bin", 0, (10**6).to_bytes(4, "little")), "token id 1000000 is out of range"),
        (flip("tokens-00000.bin", 0, (-1).to_bytes(4, "little", signed=True)), "token id -1 is out of range"),
        (flip("tokens-00000.idx", INDEX, (99).to_bytes(4, "little")), "pointers do not follow|do not add up"),
        (flip("tokens-00000.idx", INDEX + 48, (4).to_bytes(8, "little")), "pointers do not follow"),
        (flip("tokens-00000.idx", INDEX + 128, (9).to_bytes(8, "little")), "document offsets"),
        (flip("tokens-00000.idx", -1, b"\x07"), "mode that does not exist"),
        (flip("tokens-00000.idx", 0, b"XX"), "not an int32 or uint8 IndexedDataset"),
        (flip("images-00000.bin", 40, b"\0\0\0\0"), "image 0: "),
    ],
)
def test_verify_finds_wrong_content(corpus: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(corpus)
    forge(corpus)
    faults = " | ".join(verify(corpus))
    assert any(part in faults for part in message.split("|")), faults


def test_verify_finds_wrong_image_index_and_tokenizer(corpus: Path) -> None:
    shard = open_corpus(corpus).shard(0)
    offset = 4 * int(shard.lengths[0])
    flip("tokens-00000.bin", offset, (7).to_bytes(4, "little"))(corpus)
    forge(corpus)
    assert any("image index 7 is out of range" in f for f in verify(corpus))
    manifest = json.loads((corpus / "corpus.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "another"
    (corpus / "corpus.json").write_text(json.dumps(manifest))
    assert any("not the tokenizer" in f for f in verify(corpus))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "tokenizer.model", "corpus.json"])
def test_any_changed_byte_is_a_fault_and_never_a_crash(
    corpus: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a manifest that knows nothing of it, too, which leaves only the content to give it away."""
    raw, manifest = (corpus / name).read_bytes(), (corpus / "corpus.json").read_bytes()
    for number in range(120):
        rng = random.Random(number)
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= rng.choice((1, 4, 16, 64, 128, 255))
        (corpus / name).write_bytes(changed)
        code = main(["verify", str(corpus), "--quick"])
        out, err = capsys.readouterr()
        assert not err
        assert code == 1 or (code == 0 and name == "corpus.json"), (number, out)  # whose names and source are free
        if name != "corpus.json":
            assert f"{name}: its XXH3 is not that of the manifest" in out
            forge(corpus)
            assert main(["verify", str(corpus), "--quick"]) in (0, 1)
            assert not capsys.readouterr().err
            (corpus / "corpus.json").write_bytes(manifest)
    (corpus / name).write_bytes(raw)


def test_a_fault_does_not_hide_the_others(corpus: Path) -> None:
    for name, offset in (("tokenizer.model", 0), ("images-00000.arrow", -12), ("tokens-00000.bin", 0)):
        flip(name, offset, b"\xff" * 8)(corpus)
    faults = verify(corpus)
    for name in ("tokenizer.model: its XXH3", "images-00000.arrow: its XXH3", "tokens-00000.bin: its XXH3",
                 "images-00000.arrow is damaged", "tokenizer.model is not a SentencePiece model"):  # fmt: skip
        assert sum(name in fault for fault in faults) == 1, (name, faults)


def test_opening_what_is_no_corpus(tmp_path: Path, corpus: Path) -> None:
    for bad in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="is not a corpus"):
            open_corpus(bad)
    (corpus / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        open_corpus(corpus)
    (corpus / "corpus.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99"):
        open_corpus(corpus)


# --- inspect -----------------------------------------------------------------------------------------------------


def test_stats(corpus: Path) -> None:
    statistics = stats(open_corpus(corpus))
    json.dumps(statistics)
    assert statistics["counts"]["documents"] == 4
    assert statistics["distributions"]["images a document"]["mean"] == pytest.approx(5 / 4)
    assert statistics["distributions"]["similarity"]["quantiles"][0] == 0.25
    assert statistics["image_formats"] == {"PNG": 3}
    assert "tokens a document" in table(statistics)
    assert "(1 shard, " in table(statistics).splitlines()[0]
    assert "natural (1 shard)" in table({**statistics, "kinds": {"natural": 1}})


def test_show_and_page(corpus: Path, tmp_path: Path) -> None:
    assert show(open_corpus(corpus), 0).startswith("document 0 of 4: 2 texts, 1 image\n")
    text = show(open_corpus(corpus), 3)
    assert text.split("\n\n")[1:] == [
        "a", f"[image, {len(picture(2)):,} bytes, similarity 0.250 to text 1]",
        "b", f"[image, {len(picture(1)):,} bytes, similarity 0.500 to text 0]",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no document 4"):
        show(open_corpus(corpus), 4)
    page = write_page(open_corpus(corpus), tmp_path / "page.html").read_text("utf-8")
    assert page.count("data:image/jpeg;base64,") == 5
    assert "http" not in page.replace("http-equiv", "")
    assert "only text, a little longer" in page


def test_histograms_count_everything(corpus: Path, tmp_path: Path) -> None:
    page = write_page(open_corpus(corpus), tmp_path / "page.html").read_text("utf-8")
    tree = html.fromstring(page.encode())
    figures = {f.findtext("figcaption"): f for f in tree.xpath('//div[@class="histograms"]/figure')}
    shard = open_corpus(corpus).shard(0)
    tokens = [int(shard.lengths[a:b][shard.modes[a:b] == 0].sum()) for a, b in pairwise(shard.document_offsets)]
    expected = {
        "tokens a document": tokens, "images a document": [1, 2, 0, 2], "similarity": [0.25, 0.5],
        "image width, pixels": [40] * 3, "image height, pixels": [30] * 3,
        "tokens a text": shard.lengths[shard.modes == 0].tolist(),
        "image size, bytes": [len(picture(k)) for k in range(3)],
    }  # fmt: skip
    assert set(figures) == set(expected)
    assert len(tree.xpath("//body/main")) == 1
    for name, values in expected.items():
        (spoken,) = figures[name].xpath("svg/@aria-label")
        assert spoken.startswith(f"histogram of {name}, from ")
        bars = [rect.findtext("title").rsplit(": ", 1) for rect in figures[name].xpath(".//rect")]
        counts = [int(count) for _, count in bars]
        heights = [float(rect.get("height")) for rect in figures[name].xpath(".//rect")]
        assert sum(counts) == len(values), name
        np.testing.assert_allclose(heights, np.array(counts) / max(counts) * 120, atol=0.06)
        first, last = (float(label.replace(",", "")) for label in figures[name].xpath(".//text/text()"))
        assert first == pytest.approx(min(values), rel=1e-3)
        assert counts[0] == sum(v < first + (last - first) / len(counts) for v in values), name


# --- the commands ------------------------------------------------------------------------------------------------


def test_commands(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    assert run("verify", corpus) == (0, f"{corpus}: no fault found\n", "")
    code, out, _ = run("inspect", corpus, "stats", "--json")
    assert (code, json.loads(out)) == (0, json.loads(json.dumps(stats(open_corpus(corpus)))))
    assert run("inspect", corpus) == (0, table(stats(open_corpus(corpus))) + "\n", "")
    assert run("inspect", corpus, "show", "3") == (0, show(open_corpus(corpus), 3) + "\n", "")
    both = "\n\n".join(show(open_corpus(corpus), k) for k in (3, 0))
    assert run("inspect", corpus, "show", "3", "0") == (0, both + "\n", "")
    assert run("inspect", corpus, "show", "4")[0] == 2
    assert run("inspect", corpus, "show", "3", "x")[0] == 2
    assert run("inspect", corpus, "show")[0] == 2

    TOKENIZER.save(tmp_path / "t.model")
    common = ("preprocess", "--format", "jsonl", "--input", tmp_path / "in", "--tokenizer", tmp_path / "t.model")
    for job in ("1/2", "0/2"):
        code, out, _ = run(*common, "--output", tmp_path / "jobs", "--job", job)
        assert code == 0
    assert "4 documents" in out
    assert (tmp_path / "jobs/corpus.json").read_bytes() == (corpus / "corpus.json").read_bytes()
    assert run(*common, "--output", tmp_path / "jobs", "--job", "2/2")[0] == 2

    code, out, _ = run("merge", corpus, tmp_path / "jobs", "--output", tmp_path / "both")
    assert (code, out.split(":")[1].split(",")[0]) == (0, " 8 documents")
    assert run("merge", corpus, corpus, "--output", tmp_path / "twice")[0] == 2
    flip("tokens-00000.bin", 0, b"\xff")(corpus)
    code, out, err = run("verify", corpus, "--quick")
    assert (code, err) == (1, "")
    assert out.startswith("tokens-00000.bin: its XXH3")


@pytest.mark.parametrize(
    ("executor", "given", "parameters"),
    [
        ("slurm", ["slurm_partition=cpu", "timeout_min=5"], {"slurm_partition": "cpu", "timeout_min": 5}),
        ("ray", ["head:6379", "memory_gb=2"], {"address": "head:6379", "memory_gb": 2.0}),
    ],
)
def test_preprocess_in_jobs_by_command(
    monkeypatch: pytest.MonkeyPatch, executor: Any, given: list[str], parameters: dict[str, Any]
) -> None:
    pytest.importorskip("submitit")
    called: dict[str, Any] = {}

    def in_jobs(*places: Any, **options: Any) -> Summary:
        called.update(options, places=places)
        return Summary(places[2], {}, Drops(), 0)

    monkeypatch.setattr(jobs, "preprocess_in_jobs", in_jobs)
    words = [word for text in given for word in (f"--{executor}", text)]
    main(["preprocess", "--format", "jsonl", "--input", "a", "--output", "b", "--executor", executor, "--jobs", "7",
          "--workers", "3", *words])  # fmt: skip
    assert called["places"] == ("jsonl", "a", Path("b"), Engine(executor, 7, parameters))
    assert called["workers"] == 3
