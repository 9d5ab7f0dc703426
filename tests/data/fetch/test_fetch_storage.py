"""URLs in a bucket, their images into a bucket, and a corpus of both into a bucket, beside the same on a disk."""

from __future__ import annotations

import json
from pathlib import Path

import boto3
import pytest
from corpora import jpeg
from s3_server import Proxy

pytest.importorskip("aiohttp")
pytest.importorskip("protego")

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
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
