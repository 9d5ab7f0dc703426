"""URLs in a bucket, their images into a bucket, and a corpus of both into a bucket, beside the same on a disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boto3
import pytest
from corpora import jpeg
from data.fetch.faulty_server import requests_of, serving
from data.fetch.test_fetch import check_store
from s3_server import Proxy

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.fetch import run
from megatron_lcl.data.fetch.plan import Plan
from megatron_lcl.data.storage.names import UPLOADING
from megatron_lcl.data.storage.store import Store

FLAGS = ["--allow-private", "--delay", "0", "--retries", "1", "--backoff", "0.02", "--shard-urls", "4"]


@pytest.mark.slow
def test_from_a_bucket_into_a_bucket(
    s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client = boto3.client("s3", endpoint_url=s3.url, region_name="us-east-1")
    prefix = place.removeprefix("s3://bucket/")
    for k in range(9):
        client.put_object(Bucket="bucket", Key=f"{prefix}/web/{k}.jpg", Body=jpeg(k), ACL="public-read")
    urls = [f"{s3.url}/bucket/{prefix}/web/{k}.jpg" for k in range(10)]  # the last is not there
    lines = [{"items": [{"text": f"text {k}"}, {"image": url}]} for k, url in enumerate(urls)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Store(f"{place}/in").put("a.jsonl", tmp_path / "in" / "a.jsonl")
    s3.unavailable = 7
    for input, output in ((str(tmp_path / "in"), str(tmp_path)), (f"{place}/in", place)):
        for _ in range(2):  # the second time it is recognized
            assert main(["fetch", input, "--output", f"{output}/store", *FLAGS]) == 0
            assert f"{output}/store: 10 URLs: 9 kept" in capsys.readouterr().out
        words = ["preprocess", "--format", "jsonl", "--input", input, "--images", f"{output}/store"]
        assert main([*words, "--tokenizer", "clip", "--output", f"{output}/c"]) == 0
    s3.reset()
    disk, bucket = open_corpus(tmp_path / "c"), open_corpus(f"{place}/c")
    assert [bucket[k] for k in range(10)] == [disk[k] for k in range(10)]
    assert sum(len(document.images) for document in disk) == 9
    assert {*dict(Store(f"{place}/store").list())} == {
        path.relative_to(tmp_path / "store").as_posix()
        for path in (tmp_path / "store").rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }
    for file in (tmp_path / "cache").rglob("*"):
        assert not file.is_file() or b"planted/secret" not in file.read_bytes()
    assert not list((tmp_path / "cache" / "megatron_lcl").glob("outputs/*"))


def test_a_store_that_lacks_parts_is_completed(
    s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier releases could put one. The same command fetches the rest and puts it, wherever it is interrupted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    listed, store, put, do = tmp_path / "urls.txt", Store(place), Store.put, run._do
    words = ["fetch", str(listed), "--output", place, *FLAGS]
    with serving(tmp_path, addresses=8) as server:
        urls = [f"http://{server[0][k % 8]}:{server[1]}/ok/{k}" for k in range(32)]
        listed.write_text("\n".join(urls))
        with monkeypatch.context() as patch:
            patch.setattr(run, "_do", lambda output, plan, todo, *others: do(output, plan, todo[:1], *others))
            with pytest.raises(AssertionError, match="are not at their end"):
                main(words)
        assert store.list() == []
        assert main(words) == 0
        shards = sorted({name.partition(".")[0] for name, _ in store.list() if not name.startswith("plan/")})
        assert len(shards) > 4
        kept, lost = [], []
        for name, _ in store.list():
            (lost if name.partition(".")[0] in shards[2:] else kept).append(name)
        store.delete(lost)
        before = {name: store.get(name) for name in kept}
        asked = requests_of(*server)

        def interrupted(output: Path, plan: Plan, todo: list[int], *others: Any) -> None:
            do(output, plan, todo[:1], *others)
            raise KeyboardInterrupt

        def failing(self: Store, name: str, content: bytes | Path) -> None:
            if name == lost[3]:
                raise KeyboardInterrupt
            put(self, name, content)

        with monkeypatch.context() as patch:
            patch.setattr(run, "_do", interrupted)
            assert main(words) == 130
        assert {name: store.get(name) for name, _ in store.list()} == before
        s3.reset()
        with monkeypatch.context() as patch:
            patch.setattr(Store, "put", failing)
            assert main(words) == 130
        put_there = {request.path.removeprefix(f"/{place[5:]}/") for request in s3.requests if request.method == "PUT"}
        assert put_there == {UPLOADING, *lost[:3]}
        assert UPLOADING in dict(store.list())
        assert main(words) == 0
        again = requests_of(*server) - asked
        assert sum(count for path, count in again.items() if path.startswith("/ok/")) == 4 * len(shards[2:])
        assert main(words) == 0
        assert requests_of(*server) - asked == again
    for name, _ in store.list():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(store.get(name))
    check_store(tmp_path / "got", urls)
    assert {name: store.get(name) for name in kept} == before
    assert {*dict(store.list())} == {*kept, *lost}
    assert not list((tmp_path / "cache" / "megatron_lcl").glob("outputs/*"))
