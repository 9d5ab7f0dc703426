"""Outputs in object storage: what a command leaves there is what it leaves on a disk, whole or not there."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import PIL.Image
import pyarrow.parquet as pq
import pytest
from corpora import jpeg
from data.helpers import TOKENIZER, byte_level
from ports import closed_port
from s3_fixtures import upload
from s3_server import Proxy

from megatron_lcl.cli import main
from megatron_lcl.curate.passes import REMOVED_FILE
from megatron_lcl.curate.run import SAMPLES_FILE
from megatron_lcl.data.corpus import owners
from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.corpus_manifest import read_manifest
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.upload import uploaded
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.data.storage.names import UPLOADING
from megatron_lcl.data.storage.paths import path_of
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import below

CORPUS = "corpus.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def objects(place: str) -> dict[str, bytes]:
    return {name: Store(place).get(name) for name, _ in Store(place).list()}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def source(folder: Path, documents: int = 24) -> Path:
    folder.mkdir()
    texts = [[{"text": "word " * (1 + k % 5)}, {"text": f"document {k} of these"}] for k in range(documents)]
    lines = [{"items": [*of_one, {"image": f"{k}.jpg"}]} for k, of_one in enumerate(texts)]
    for k in range(documents):
        (folder / f"{k}.jpg").write_bytes(jpeg(k))
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def corpus(folder: Path, documents: int = 24) -> Path:
    """One of three shards, with pictures."""
    given = source(folder.with_name(f"{folder.name}-in"), documents)
    options = {"tokenizer": "clip", "shard_documents": 9}
    return preprocess("jsonl", given, folder, **options).path  # type: ignore[return-value]


def left(cache: Path) -> list[Path]:
    """What work on outputs has left on the disk."""
    return list((cache / "megatron_lcl" / "outputs").glob("*"))


def puts(s3: Proxy) -> list[str]:
    return [request.path.rpartition("/")[2] for request in s3.requests if request.method == "PUT"]


def test_preprocess_and_curate(
    s3: Proxy, place: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path / "in")
    words = ["preprocess", "--format", "jsonl", "--input", str(given), "--tokenizer", "clip", "--shard-documents", "9"]
    assert main([*words, "--output", str(tmp_path / "disk")]) == 0
    s3.unavailable, s3.cut = 7, 5
    assert main([*words, "--output", f"{place}/c"]) == 0
    assert objects(f"{place}/c") == files(tmp_path / "disk")
    assert left(cache) == []
    s3.reset()
    assert main([*words, "--output", f"{place}/c"]) == 0  # recognized
    assert puts(s3) == []
    assert main([*words, "--output", f"{place}/c", "--limit", "3"]) == 2  # and not another
    assert f"{place}/c holds another corpus (its limit differ)" in capsys.readouterr().err
    assert objects(f"{place}/c") == files(tmp_path / "disk")
    rules = ["--text.min_words", "3"]
    assert main(["curate", str(tmp_path / "disk"), "--output", str(tmp_path / "curated"), *rules]) == 0
    s3.unavailable = 9
    assert main(["curate", f"{place}/c", "--output", f"{place}/curated", *rules]) == 0
    assert objects(f"{place}/curated") == files(tmp_path / "curated")
    assert main(["curate", f"{place}/c", "--output", f"{place}/curated", *rules]) == 0
    assert verify(f"{place}/curated") == []
    assert left(cache) == []
    # what was written there is what is on the disk
    secret, said = os.environ["AWS_SECRET_ACCESS_KEY"], capsys.readouterr()
    assert secret not in said.out + said.err + str(pq.read_table(tmp_path / "curated" / REMOVED_FILE).to_pylist())
    assert [name for name, content in files(tmp_path).items() if secret.encode() in content] == []


def test_held_out_documents(s3: Proxy, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preprocess", "--format", "jsonl", "--input", str(source(tmp_path / "in")), "--tokenizer", "clip"]
    both = {name: ["--output", f"{at}/c", "--held-out", f"{at}/h"] for name, at in (("disk", tmp_path), ("s3", place))}
    assert [main([*words, *given]) for given in both.values()] == [0, 0]
    said = capsys.readouterr().out
    assert f"\n{place}/c: " in said
    assert f"\nheld out: {place}/h: " in said
    for name in "ch":
        assert objects(f"{place}/{name}") == files(tmp_path / name)


def test_merge_retokenize_and_export_a_corpus(s3: Proxy, place: str, tmp_path: Path, cache: Path) -> None:
    made = [corpus(tmp_path / f"{k}", 20 + k) for k in range(2)]
    urls = [upload(folder, f"{place}/{folder.name}") for folder in made]
    merge(made, tmp_path / "merged")
    s3.unavailable, s3.cut = 11, 7
    assert main(["merge", *urls, "--output", f"{place}/merged"]) == 0
    assert objects(f"{place}/merged") == files(tmp_path / "merged")
    assert main(["merge", *urls, "--output", str(tmp_path / "fetched")]) == 0
    assert files(tmp_path / "fetched") == files(tmp_path / "merged")
    assert main(["merge", *urls, "--output", str(tmp_path / "fetched")]) == 0  # recognized
    for given in (urls, [f"{place}/merged"]):
        assert main(["merge", *given, "--output", f"{place}/merged"]) == 2
    assert objects(f"{place}/merged") == files(tmp_path / "merged")
    assert main(["merge", *map(str, made), "--move", "--output", f"{place}/moved"]) == 2
    assert main(["merge", *urls, "--move", "--output", str(tmp_path / "moved")]) == 2
    assert main(["export-corpus", str(made[0]), "--output", str(tmp_path / "lines")]) == 0
    assert main(["export-corpus", urls[0], "--output", f"{place}/lines"]) == 0
    assert objects(f"{place}/lines") == files(tmp_path / "lines")
    assert main(["export-corpus", urls[0], "--output", f"{place}/lines"]) == 2
    assert left(cache) == []


def test_verify_reads_every_byte(s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = corpus(tmp_path / "c")
    url = upload(made, place)
    s3.cut = 5
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        left = tmp_path / f"megatron-lcl-verify-{owners.machine()}-{2**30}-{'0' * 32}"  # no process has that number
        left.mkdir()
        assert main(["verify", url]) == 0
        assert not [*tmp_path.glob("megatron-lcl-verify-*")]
    s3.reset()
    damaged = bytearray((made / "images-00001.bin").read_bytes())
    damaged[100] ^= 1
    Store(url).put("images-00001.bin", bytes(damaged))
    Store(url).delete(["tokens-00000.bin"])
    faults = verify(url)
    assert faults[0] == "tokens-00000.bin: No such file or directory"
    assert "images-00001.bin: its XXH3 is not that of the manifest" in faults
    assert any(fault.startswith("shard 00001: image 0:") for fault in faults)
    assert main(["verify", url]) == 1


def test_interrupted_anywhere(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, put, allowed = corpus(tmp_path / "c", 8), Store.put, [0]
    expected = files(made)

    def failing(self: Store, name: str, content: bytes | Path) -> None:
        if not allowed[0]:
            raise KeyboardInterrupt
        allowed[0] -= 1
        put(self, name, content)

    def run(url: str, last: str | None) -> None:
        with uploaded(url, tmp_path / "work", last, resumes=False) as folder:
            shutil.copytree(made, folder)

    monkeypatch.setattr(Store, "put", failing)
    for last in (CORPUS, None):
        url, before = f"{place}/{last}", set[str]()
        for number in range(len(expected) + 2):
            allowed[0] = (0, 3)[number] if number < 2 else 2  # what says what is to come, and a file more each time
            with pytest.raises(KeyboardInterrupt):
                run(url, last)
            there = {*dict(Store(url).list())} - {UPLOADING}
            assert len(there) == number
            assert there >= before
            before = there
            if len(there) == len(expected) - 1:
                break
            if last or number:
                with pytest.raises(UserError, match="is not a corpus" if last else "is being written"):
                    open_corpus(url) if last else list(below(path_of(url)))
        allowed[0] = 99
        run(url, last)
        assert objects(url) == expected
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("below", ["数据" * 20, "a/" * 120 + "a", "s" * 230], ids=["no-ascii", "slashes", "long"])
def test_a_long_url(place: str, tmp_path: Path, below: str) -> None:
    """Of two that begin alike each has its own folder; that of the last part must have room for a suffix, too."""
    urls = [f"{place}/{below}{end}/{name}" for end in "xy" for name in ("c", "数" * 84)]
    folders = []
    for url in urls:
        with uploaded(url, tmp_path / "work", None, resumes=True) as folder:
            folder.mkdir()
            folder.with_name(f"{folder.name}.slurm").mkdir()
            (folder / "a").write_text(url)
        folders.append(folder)
    assert [objects(url) for url in urls] == [{"a": url.encode()} for url in urls]
    assert len({*folders}) == len(urls)


def test_what_is_there_is_not_written_over(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(content: str, last: str | None = None, resumes: bool = False) -> None:
        with uploaded(place, tmp_path / "work", last, resumes=resumes) as folder:
            if content == "fails":
                raise UserError("as bad input does")
            folder.mkdir(exist_ok=True)
            (folder / "a").write_text(content)

    with pytest.raises(UserError, match="as bad"):
        run("fails")
    assert Store(place).list() == []
    store = Store(place)
    store.put(UPLOADING, json.dumps({"fingerprint": "of another"}).encode())
    with pytest.raises(UserError, match=r"an upload of something else to s3://.* was begun and not finished"):
        run("one")
    assert [name for name, _ in store.list()] == [UPLOADING]
    store.put(UPLOADING, b"[]")
    with pytest.raises(UserError, match="is none of ours"):
        run("one")
    store.delete([UPLOADING])
    store.put("b", b"of somebody")
    with pytest.raises(UserError, match=r"holds other objects \(b, 1 in all\)"):
        run("one")
    store.delete(["b"])
    run("one", "a", resumes=True)
    store.put(UPLOADING, json.dumps({"fingerprint": "of a"}).encode())  # whoever put it was killed at the very end
    with pytest.raises(UserError, match="holds such an output already"):
        run("two", "a")
    assert [name for name, _ in store.list()] == ["a"]
    with pytest.raises(UserError, match="its a differs"):
        run("two", "a", resumes=True)
    assert objects(place) == {"a": b"one"}
    store.put("b.json", b"{}")
    left = tmp_path / "work" / quote("s3://bucket", safe="") / place.rpartition("/")[2]
    left.mkdir(parents=True, exist_ok=True)
    (left / "a").write_text("one")
    (left / "b.json").write_text("[1]")
    with pytest.raises(UserError, match=r"than was begun in .* \(its b.json differs\); remove that folder"):
        run("one", "a", resumes=True)
    (left / "b.json").write_text("{}")
    (left / "c").write_text("more")
    run("one", "a", resumes=True)  # of the same output, and the place lacks some of it
    there = {"a": b"one", "b.json": b"{}", "c": b"more"}
    assert objects(place) == there

    rmtree = shutil.rmtree

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if folder == left:
            next(folder.glob("b*")).unlink()
            raise KeyboardInterrupt
        rmtree(folder, ignore_errors)

    with monkeypatch.context() as patch:  # while the folder is removed
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run("one", "a", resumes=True)
    assert left.exists()
    run("one", "a", resumes=True)
    assert not left.exists()
    assert objects(place) == there
    with (
        pytest.raises(UserError, match="outputs are written to a disk or to object storage"),
        uploaded("https://host/folder", tmp_path / "work", None, resumes=False),
    ):
        pass


@pytest.mark.slow
def test_killed_in_mid_upload(s3: Proxy, place: str, tmp_path: Path, cache: Path) -> None:
    given = source(tmp_path / "in", 40)
    words = ["preprocess", "--format", "jsonl", "--input", str(given), "--tokenizer", "clip", "--shard-documents", "9"]
    assert main([*words, "--output", str(tmp_path / "disk")]) == 0
    s3.reset()
    s3.latency = 0.05
    command = [sys.executable, "-m", "megatron_lcl", *words, "--output", place]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and "tokens-00001.bin" not in puts(s3):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    time.sleep(1)  # its requests end with it
    assert UPLOADING in objects(place)
    with pytest.raises(UserError, match="is not a corpus"):
        open_corpus(place)
    s3.reset()
    assert main([*words, "--output", place]) == 0
    assert 0 < len(puts(s3)) < len(files(tmp_path / "disk"))
    assert objects(place) == files(tmp_path / "disk")
    assert left(cache) == []


@pytest.fixture
def closed() -> Iterator[int]:
    with closed_port() as port:
        yield port


@pytest.mark.parametrize("what", ["address", "keys", "bucket", "refused"])
def test_errors_are_one_line_before_anything_is_done(
    s3: Proxy, place: str, tmp_path: Path, cache: Path, what: str, closed: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given, said = source(tmp_path / "in"), "there is no bucket 'nowhere' at http://127.0.0.1"
    match what:
        case "address":
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed}")
            said = "check AWS_ENDPOINT_URL"
        case "keys":
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
            monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
            said = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case "bucket":
            place = "s3://nowhere/c"
        case "refused":
            planted = b"<Error><Code>AccessDenied</Code><Message>AKIA0PLANTED0KEY</Message></Error>"
            s3.answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%b" % (len(planted), planted)
            said = "refused (AccessDenied)"
    commands = [["preprocess", "--format", "jsonl", "--input", str(given), "--output", place]]
    if what in ("bucket", "refused"):
        (listed := tmp_path / "urls.txt").write_text("http://127.0.0.1:9/1.jpg\n")
        commands += [
            ["preprocess", "--format", "jsonl", "--input", f"{place}/in", "--output", str(tmp_path / "out")],
            ["curate", str(given), "--text.min_words", "1", "--output", place],
            ["curate", f"{place}/in", "--text.min_words", "1", "--output", str(tmp_path / "out")],
            ["fetch", str(listed), "--output", place],
            ["fetch", f"{place}/in", "--output", str(tmp_path / "out")],
        ]
    before = {path for path in tmp_path.rglob("*") if cache not in (path, *path.parents)}
    for words in commands:
        assert main(words) == 2
        out, error = capsys.readouterr()
        lines = [line for line in error.splitlines() if "looking for the files" not in line]  # said where it takes long
        (line,) = lines
        assert said in line
        assert "PLANTED" not in out + error
        assert "secret/of" not in out + error
    assert left(cache) == []
    assert {path for path in tmp_path.rglob("*") if cache not in (path, *path.parents)} == before


def test_places_that_are_refused(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = str(source(tmp_path / "in"))
    for words, said in (
        (["preprocess", "--format", "jsonl", "--input", given, "--output", place, "--job", "0/2"], "need --work DIR"),
        (["preprocess", "--format", "jsonl", "--input", place, "--output", f"{place}/c"], "lies in the folder of the"),
        (
            ["preprocess", "--format", "jsonl", "--input", given, "--output", place, "--held-out", f"{place}/"],
            "the held-out corpus cannot have the place of the corpus itself",
        ),
        (["fetch", given, "--output", place, "--job", "0/2"], "--job fetches a part of a store"),
        (["train", "--train.output", place], "checkpoint.mirror=s3://bucket/folder"),
        (["demo", "emoji", "--output", place], "--output is s3://…: use a path of a file system"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert Store(place).list() == []


def test_jobs_share_a_work_folder(place: str, tmp_path: Path) -> None:
    words = ["preprocess", "--format", "jsonl", "--input", str(source(tmp_path / "in")), "--tokenizer", "clip"]
    assert main([*words, "--output", str(tmp_path / "disk")]) == 0
    for job in ("1/2", "0/2", "1/2"):
        assert (CORPUS in objects(place)) == (job == "1/2" and bool(Store(place).exists(CORPUS)))
        assert main([*words, "--output", place, "--work", str(tmp_path / "work"), "--job", job]) == 0
    assert objects(place) == files(tmp_path / "disk")


def test_retokenize_copies_whole_images(s3: Proxy, place: str, tmp_path: Path) -> None:
    made = preprocess("jsonl", source(tmp_path / "in"), tmp_path / "c", tokenizer=TOKENIZER).path
    tokenizers.JsonTokenizer(byte_level().to_str().encode()).save(tmp_path / "tokenizer.json")
    url = upload(Path(made), f"{place}/c")
    len(open_corpus(url)[3].images[0].data)  # so that the cache has a part of the images
    words = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--output"]
    assert main(["retokenize", str(made), *words, str(tmp_path / "new")]) == 0
    assert main(["retokenize", url, *words, f"{place}/new"]) == 0
    assert objects(f"{place}/new") == files(tmp_path / "new")


def test_curate_by_rules_over_the_whole_corpus(
    s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_lcl.data.corpus.remote.LIMIT", 0.0
    )  # no room in the cache, whose files have holes then
    given, again = source(tmp_path / "in"), io.BytesIO()
    PIL.Image.open(given / "0.jpg").save(again, "JPEG", quality=95)
    (given / "9.jpg").write_bytes(again.getvalue())
    made = preprocess("jsonl", given, tmp_path / "c", tokenizer="clip").path
    url = upload(Path(made), f"{place}/c")
    rules = ["--duplicates.images.action", "keep-one", "--duplicates.images.min_detail", "0"]
    assert main(["curate", str(made), "--output", str(tmp_path / "new"), *rules]) == 0
    assert main(["curate", url, "--output", f"{place}/new", *rules]) == 0
    assert any(rule["images"] for rule in read_manifest(tmp_path / "new")["curated"]["rules"])
    theirs, ours = files(tmp_path / "new"), objects(f"{place}/new")
    # these name the corpus
    assert {name for name in theirs if ours[name] != theirs[name]} <= {REMOVED_FILE, SAMPLES_FILE, CORPUS}
    columns = ["document", "item", "rule", "value"]
    rows = [pq.read_table(io.BytesIO(found[REMOVED_FILE]), columns=columns) for found in (ours, theirs)]
    assert rows[0].equals(rows[1])
    ranges = [r for r in s3.requests if "/c/images-00000.bin" in r.path and r.method == "GET"]
    assert len(ranges) <= 3  # of both passes, and of the samples
