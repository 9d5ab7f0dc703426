"""Protects the options and limits of `preprocess`: each changes what it says."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data import writers
from data.helpers import TOKENIZER, plain
from data.writers import picture

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare import preprocess as preprocess_module
from megatron_lcl.data.prepare import preprocess_task as pipeline
from megatron_lcl.data.prepare.budget import Unusable
from megatron_lcl.data.prepare.importers import Unit, create, read_options
from megatron_lcl.data.prepare.importers.jsonl import JsonlImporter
from megatron_lcl.data.prepare.importers.mmc4 import Mmc4Importer
from megatron_lcl.data.prepare.preprocess import Summary, preprocess
from megatron_lcl.errors import UserError

DOCUMENTS = [Document((Image(picture(k)), Text(f"text {k}"))) for k in range(40)]


def shards(tmp_path: Path, **limits: Any) -> list[int]:
    """Documents of each shard."""
    writers.write_jsonl(DOCUMENTS, tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, **limits)
    corpus = open_corpus(tmp_path / "out")
    assert plain(list(corpus)) == plain(DOCUMENTS)
    return [shard["documents"] for shard in corpus.manifest["shards"]]


def test_what_ends_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BATCH", 12)  # items, and one for each document: four documents
    assert shards(tmp_path / "none") == [40]
    assert shards(tmp_path / "documents", shard_documents=15) == [15, 15, 10]
    enough = sum(len(picture(k)) for k in range(8))
    assert shards(tmp_path / "bytes", shard_bytes=enough) == [8] * 5
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "PART_PIECES", 9)
        assert shards(tmp_path / "pieces") == [8] * 5
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "PART_IMAGES", 5)
        assert shards(tmp_path / "images") == [8] * 5
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 2 * len(picture(0)) - 100)
    assert shards(tmp_path / "batch", shard_bytes=1) == [2] * 20


def test_the_first_documents(tmp_path: Path) -> None:
    """Of all units in order, with the drops among them; in any number of tasks the same."""
    (tmp_path / "in").mkdir()
    for part in range(3):
        lines = ['{"items": 3}', *(f'{{"items": [{{"text": "{part} {k}"}}]}}' for k in range(10)), '{"items": 4}']
        (tmp_path / f"in/{part}.jsonl").write_text("\n".join(lines))
    for limit, bad in ((1, 1), (10, 1), (11, 3), (15, 3), (30, 5), (99, 6)):
        for task_bytes in (1, 1 << 20):
            output = tmp_path / f"out-{limit}-{task_bytes}"
            summary = preprocess("jsonl", tmp_path / "in", output, tokenizer=TOKENIZER, limit=limit,
                                 task_bytes=task_bytes, max_bad_fraction=1)  # fmt: skip
            texts = [document.texts[0].text for document in open_corpus(output)]
            assert texts == [f"{k // 10} {k % 10}" for k in range(min(limit, 30))]
            assert summary.drops.bad_counts == {'document: no list "items"': bad}
    with pytest.raises(UserError, match=r"its layout, limit differ\); give a new folder"):
        preprocess("jsonl", tmp_path / "in", output, tokenizer=TOKENIZER, limit=5)
    for name in ("limit", "shard_bytes", "shard_documents"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} 0: give at least 1"):
            preprocess("jsonl", tmp_path / "in", output, tokenizer=TOKENIZER, **{name: 0})


def test_the_first_documents_are_read_as_all_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their kind, what stands between texts, the lines of what is bad, and what is prepared before."""
    prepared: list[Path] = []
    monkeypatch.setattr(Mmc4Importer, "prepare", lambda self, folder: prepared.append(folder))
    lines = [json.dumps({"text_list": [f"{k}.", "and more"], "image_info": []}) for k in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "bad", *lines[1:]]))
    manifests = []
    for limit in (None, 3):
        output = tmp_path / str(limit)
        summary = preprocess("mmc4", tmp_path / "a.jsonl", output, tokenizer=TOKENIZER, max_bad_fraction=1, limit=limit)
        assert summary.drops.names == {"document: not JSON": ["a.jsonl:2"]}
        manifests.append({key: open_corpus(output).manifest[key] for key in ("shards", "files")})
    assert manifests[0] == manifests[1]
    assert prepared == [tmp_path / str(limit) / preprocess_module.WORK for limit in (None, 3)]


def test_the_seed_draws_what_is_held_out(tmp_path: Path) -> None:
    writers.write_jsonl(DOCUMENTS, tmp_path / "in")
    drawn = []
    for seed in (0, 0, 1):
        folders = [tmp_path / f"{side}-{len(drawn)}" for side in ("out", "held")]
        preprocess("jsonl", tmp_path / "in", folders[0], held_out=folders[1], tokenizer=TOKENIZER, seed=seed)
        drawn.append([document.texts[0].text for document in open_corpus(folders[1])])
    assert drawn[0] == drawn[1] != drawn[2]
    assert open_corpus(folders[0]).manifest["recipe"]["rules"] == 5  # two are of how images are compared
    with pytest.raises(UserError, match=r"holds another corpus \(its held_out differ\)"):
        preprocess("jsonl", tmp_path / "in", folders[0], held_out=folders[1], tokenizer=TOKENIZER, seed=0)


def test_far_fewer_held_out_than_asked_for_is_said(tmp_path: Path) -> None:
    """All but one document have the same image, and so are one group."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(picture(0))
    lines = [json.dumps({"items": [{"text": f"text {k}"}, *([{"image": "a.png"}] if k else [])]}) for k in range(40)]
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    for _ in range(2):  # also of a corpus that was finished before
        found = preprocess("jsonl", tmp_path / "in", tmp_path / "out", held_out=tmp_path / "held", tokenizer=TOKENIZER)
        assert "\n  1 of about 5 documents asked for: those of one page" in str(found)
    assert "asked for" not in str(replace(found, held_out_fraction=0.05)), "that is half of it"


@pytest.mark.parametrize("kind", ["document", "text", "image", "damaged image"])
def test_what_may_be_bad_is_the_same_with_held_out_documents(tmp_path: Path, kind: str) -> None:
    """A fifth: of lines; of texts, or images that are missing, which the importer counts; or damaged, which each half
    counts."""
    (tmp_path / "in").mkdir()
    lines = []
    for k in range(20):
        if kind != "image" or k % 5:
            (tmp_path / f"in/{k}.png").write_bytes(picture(k)[: 60 if kind == "damaged image" and k % 5 == 0 else None])
        text = 3 if kind == "text" and k % 5 == 0 else f"text {k}"
        lines.append(json.dumps({"items": [{"text": text}, {"image": f"{k}.png"}]}))
        if kind == "document" and k % 4 == 0:
            lines.append("bad line")
    for part in range(4):
        (tmp_path / f"in/{part}.jsonl").write_text("\n".join(lines[part::4]))
    bad, seen = (5, 25) if kind == "document" else (4, 20)
    for options in (
        {},
        {"held_out": tmp_path / "held", "held_out_fraction": 0.4, "task_bytes": 1, "shard_documents": 3},
    ):
        arguments: dict[str, Any] = {"tokenizer": TOKENIZER, **options}
        with pytest.raises(Unusable, match=f"^{bad} of {seen} {kind.split()[-1]}s are bad, 20%"):
            preprocess("jsonl", tmp_path / "in", tmp_path / "out", max_bad_fraction=0.199, **arguments)
        shutil.rmtree(tmp_path / "out")  # the half that was finished before the other was judged, or the list
        preprocess("jsonl", tmp_path / "in", tmp_path / "out", max_bad_fraction=0.2, **arguments)
        shutil.rmtree(tmp_path / "out")


def test_too_much_that_is_bad_ends_the_run_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    documents = JsonlImporter.documents

    def watched(self: JsonlImporter, unit: Unit, drops: Drops) -> Iterator[Document]:
        seen.append(unit.name)
        return documents(self, unit, drops)

    monkeypatch.setattr(JsonlImporter, "documents", watched)
    (tmp_path / "in").mkdir()
    for k in range(4):
        lines = ['{"items": [{"text": "a"}]}'] * 700 + ['{"items": 3}'] * 300
        (tmp_path / f"in/{k}.jsonl").write_text("\n".join(lines))
    with pytest.raises(Unusable, match="300 of 1,000 documents are bad"):
        preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, task_bytes=1)
    assert seen == ["0.jsonl"]


DONE = Summary(Path("b"), {}, Drops(), 0)


def test_the_command_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        preprocess_module, "preprocess", lambda *places, **options: given.update(options, at=places) or DONE
    )
    main(["preprocess", "--format", "obelics", "--input", "a", "--output", "b", "--images", "c", "--tokenizer", "d",
          "--held-out", "e", "--held-out-fraction", "0.1", "--max-bad-fraction", "0.3",
          "--max-image-side", "512", "--held-out-seed", "7", "--limit", "9", "--shard-bytes", "1000",
          "--shard-documents", "20", "--option", "image_name={md5}", "--option", "rule={row}_{file}",
          "--workers", "3", "--job", "1/4"])  # fmt: skip
    assert given == {
        "at": ("obelics", "a", Path("b")), "images": "c", "tokenizer": "d", "held_out": Path("e"),
        "held_out_fraction": 0.1, "max_bad_fraction": 0.3, "max_image_side": 512,
        "seed": 7, "limit": 9, "shard_bytes": 1000, "shard_documents": 20,
        "options": {"image_name": "{md5}", "rule": "{row}_{file}"},
        "workers": 3, "job": (1, 4), "progress": True,
    }  # fmt: skip
    given.clear()
    main(["preprocess", "--format", "obelics", "--input", "a", "--output", "b", "--vocab-size", "500"])
    assert (given["tokenizer"], given["vocab_size"]) == (None, 500)
    assert given.keys().isdisjoint({"held_out", "held_out_fraction", "seed"}), "the library has the defaults"


def test_the_option_decides_what_a_text_means(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(preprocess_module, "preprocess", lambda *places, **options: given.update(options) or DONE)
    places = ["--input", "a", "--output", "b"]
    main(["preprocess", "--format", "html", *places, "--option", "min_side=064", "--option", "max_page_share=1",
          "--option", "text_pages=no"])  # fmt: skip
    assert given["options"] == {"min_side": 64, "max_page_share": 1.0, "text_pages": False}
    main(["preprocess", "--format", "obelics", *places, "--option", "image_name=0123"])
    assert given["options"] == {"image_name": "0123"}


def test_the_parameter_decides_what_slurm_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    from megatron_lcl.data.prepare import jobs

    given: dict[str, Any] = {}
    monkeypatch.setattr(jobs, "preprocess_in_jobs", lambda *p, **options: given.update(p[3].parameters) or DONE)
    texts = ["slurm_account=0123", "slurm_partition=no", "timeout_min=0600", "mem_gb=2", "slurm_mem=64e3",
             "slurm_exclusive=yes", "slurm_additional_parameters={reservation: a, nice: 9}",
             "slurm_setup=[a, 01]"]  # fmt: skip
    arguments = [word for text in texts for word in ("--slurm", text)]
    main(["preprocess", "--format", "jsonl", "--input", "a", "--output", "b", "--executor", "slurm", *arguments])
    assert given == {
        "slurm_account": "0123", "slurm_partition": "no", "timeout_min": 600, "mem_gb": 2.0, "slurm_mem": "64e3",
        "slurm_exclusive": True, "slurm_additional_parameters": {"reservation": "a", "nice": 9},
        "slurm_setup": ["a", "01"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--executor", "slurm", "--job", "0/2"], "give one of the two"),
        (["--executor", "ray", "--slurm", "mem_gb=2"], "--slurm is for slurm"),
        (["--executor", "ray", "--ray", "memory=2"], "no --ray memory; the nearest is `memory_gb`"),
        (["--executor", "ray", "--ray", "num_cpus=many"], "--ray num_cpus = 'many'"),
        (["--executor", "ray", "--jobs", "0"], "--jobs 0: give at least 1"),
        (["--jobs", "2"], "here --workers does it"),
    ],
)
def test_arguments_of_jobs_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (tmp_path / "in").mkdir()
    places = ["--format", "jsonl", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(["preprocess", *places, *words]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


URLS = ["http://x/é", "http://y/2"]


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("{sha256}", [hashlib.sha256(url.encode()).hexdigest() for url in URLS]),
        ("{sha1}", [hashlib.sha1(url.encode()).hexdigest() for url in URLS]),
        ("{md5}", [hashlib.md5(url.encode()).hexdigest() for url in URLS]),
        ("{file}-{row}-{number}", ["a-1-0", "a-1-1"]),
        ("{row}.{position}.jpg", ["1.0.jpg", "1.2.jpg"]),
    ],
)
def test_image_names_of_obelics(tmp_path: Path, rule: str, names: list[str]) -> None:
    rows = [{"images": [None], "texts": ["s"]}, {"images": [URLS[0], None, URLS[1]], "texts": [None, "t", None]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "images").mkdir()
    for k, name in enumerate(names):
        (tmp_path / "images" / name).write_bytes(picture(k))
    preprocess("obelics", tmp_path / "a.parquet", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER,
               options={"image_name": rule})  # fmt: skip
    assert [i.data for i in open_corpus(tmp_path / "out")[1].images] == [picture(0), picture(1)]


def test_images_in_one_tar(tmp_path: Path) -> None:
    writers.write_jsonl(DOCUMENTS, tmp_path / "in")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for file in sorted((tmp_path / "in").glob("*.img")):
            writers._add(archive, f"folder/{file.name}", file.read_bytes())
            file.unlink()
    preprocess("jsonl", tmp_path / "in", tmp_path / "out", images=tmp_path / "images.tar", tokenizer=TOKENIZER)
    assert plain(list(open_corpus(tmp_path / "out"))) == plain(DOCUMENTS)


def test_a_stored_zip_that_is_cut_and_one_of_two_members(tmp_path: Path) -> None:
    line = json.dumps({"items": [{"text": "a"}]}) + "\n"
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in/cut.jsonl.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x", line * 100)
    raw = (tmp_path / "in/cut.jsonl.zip").read_bytes()
    (tmp_path / "in/cut.jsonl.zip").write_bytes(raw[: raw.index(line.encode()) + 50 * len(line)])
    with zipfile.ZipFile(tmp_path / "in/two.jsonl.zip", "w") as archive:
        for name, content in (("x", line * 3), ("y", line * 2 + line.rstrip()), ("empty", ""), ("z", line.rstrip())):
            archive.writestr(name, content)  # of which none runs on into the next
    summary = preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER)
    assert summary.counts["documents"] == 57
    assert summary.drops.bad_counts == {"document: truncated file, the lines after it are lost": 1}
    assert summary.drops.noted_counts["document: zip holds 4 files, not one"] == 1


@pytest.mark.parametrize(
    ("format", "arguments", "message"),
    [
        ("jsonl", ["--workers", "0"], "--workers 0: give at least 1"),
        ("jsonl", ["--max-bad-fraction", "nan"], "--max-bad-fraction nan: give"),
        ("jsonl", ["--max-bad-fraction", "-1"], "--max-bad-fraction -1.0: give"),
        ("jsonl", ["--held-out", "h", "--held-out-fraction", "2"], "--held-out-fraction 2.0: give"),
        ("jsonl", ["--held-out-fraction", "0.2"], "--held-out-fraction 0.2 goes with --held-out DIR"),
        ("jsonl", ["--held-out-seed", "0"], "--held-out-seed 0 goes with --held-out DIR"),
        (
            "jsonl",
            ["--vocab-size", "4096"],
            "--vocab-size 4096 is of a tokenizer that is trained, and --tokenizer clip",
        ),
        ("jsonl", ["--max-image-side", "1"], "--max-image-side 1: give"),
        ("jsonl", ["--jobs", "3"], "are for --executor slurm"),
        ("jsonl", ["--slurm", "a=b"], "are for --executor slurm"),
        ("jsonl", ["--output", "in/out"], "lies in the folder of the input"),
        ("jsonl", ["--held-out", "in"], "lies in the folder of the input"),
        ("obelics", ["--option", "image_name={row.x}"], "it may use {sha256}"),
        ("obelics", ["--option", "image_name={row[0]}"], "it may use {sha256}"),
        ("obelics", ["--option", "image_name={file:05d}"], "it may use {sha256}"),
        ("obelics", ["--option", "image_name={md5:99999999999}"], "it may use {sha256}"),
        ("html", ["--option", "min_side=64px"], "--option min_side=64px: give a value such as 64"),
        ("html", ["--option", "min_side="], "--option min_side=: give"),
        ("html", ["--option", "min_side=2020-13-45"], "--option min_side=2020-13-45: give"),
        ("html", ["--option", "max_words=1e3"], "--option max_words=1e3: give"),
        ("html", ["--option", "max_page_share=5%"], "--option max_page_share=5%: give"),
        ("html", ["--option", "text_pages=maybe"], "--option text_pages=maybe: give a value such as false"),
    ],
)
def test_wrong_uses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    writers.write_jsonl(DOCUMENTS[:1], tmp_path / "in")
    (tmp_path / "in/a.html").write_text("<p>text</p>")
    pq.write_table(pa.Table.from_pylist([{"images": [None], "texts": ["s"]}]), tmp_path / "in/a.parquet")
    before = sorted(tmp_path.rglob("*"))
    command = ["preprocess", "--format", format, "--input", "in", "--output", "out", "--tokenizer", "clip", *arguments]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("rule", ["{sha256:.8}", "{file:>3}", "{row:05d}_{number}"])
def test_naming_rules_may_format(tmp_path: Path, rule: str) -> None:
    pq.write_table(pa.Table.from_pylist([{"images": [None], "texts": ["s"]}]), tmp_path / "a.parquet")
    options = {"image_name": rule}
    preprocess("obelics", tmp_path / "a.parquet", tmp_path / "out", tokenizer=TOKENIZER, options=options)


def test_one_job_says_that_others_are_missing(tmp_path: Path) -> None:
    for k in range(2):
        writers.write_jsonl([Document((Text(f"text {k}"),))], tmp_path / f"in/{k}")
    arguments = ("jsonl", tmp_path / "in", tmp_path / "out")
    first = preprocess(*arguments, tokenizer=TOKENIZER, task_bytes=1, job=(1, 2))
    assert str(first) == f"{tmp_path}/out: this job is done, others are not yet"
    assert "2 documents" in str(preprocess(*arguments, tokenizer=TOKENIZER, task_bytes=1, job=(0, 2)))


class Picky(JsonlImporter):
    """Options of the types that another package's importer may have."""

    def __init__(
        self,
        input: Path,
        images: Path | None = None,
        *,
        where: Path | None = None,
        rate: float | None = None,
        mode: Literal["x", "y"] = "x",
        names: tuple[str, ...] = (),
        plain=None,  # type: ignore[no-untyped-def]  # as in a package without types
    ) -> None:
        super().__init__(input, images)
        self.given = (where, rate, mode, names, plain)


def test_options_have_the_type_that_their_importer_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lcl.data.prepare.importers.importer_class", lambda _: Picky)
    writers.write_jsonl([Document((Text("a"),))], tmp_path)

    def given(**texts: str) -> object:
        importer = create("picky", tmp_path, None, read_options("picky", texts))
        assert isinstance(importer, Picky)
        return importer.given

    assert given() == (None, None, "x", (), None)
    some = given(where="a/b", rate="0.5", mode="y", names="[a, b]", plain="word")
    assert some == (Path("a/b"), 0.5, "y", ("a", "b"), "word")
    assert given(names="b") == (None, None, "x", ("b",), None)
    for name, text in {"rate": "x", "mode": "z"}.items():
        with pytest.raises(UserError, match=rf"--option {name}={text}: give a value such as .* \(input should be"):
            given(**{name: text})
