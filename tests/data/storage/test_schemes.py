"""What is a URL of object storage, what is a path, and that no message repeats a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.data.storage.faults import explained
from megatron_lcl.data.storage.store import to_show, url_of
from megatron_lcl.errors import UserError


def test_urls(tmp_path: Path) -> None:
    assert url_of("s3://bucket/a/") == "s3://bucket/a"
    assert url_of(Path("s3://bucket/a")) == "s3://bucket/a"
    assert url_of("corpora/s3") is None
    assert url_of(tmp_path) is None
    for wrong in ("s3://user:planted@bucket/a", "https://host/a?X-Amz-Signature=planted"):
        with pytest.raises(UserError, match="environment variables") as raised:
            url_of(wrong)
        assert "planted" not in str(raised.value)
    with pytest.raises(UserError, match="no bucket"):
        url_of("s3://")
    for wrong in ("s3://user:planted@[bucket/a", "https://user:planted@h\N{ACCOUNT OF}/a"):
        with pytest.raises(UserError, match="is no URL; check the name of the host or bucket") as raised:
            url_of(wrong)
        assert "planted" not in str(raised.value)
    assert [url_of(place) for place in ("S3://bucket/A", Path("HTTPS://host/a"))] == ["s3://bucket/A", "https://host/a"]
    assert [to_show(place) for place in ("s3:/bucket/a/", Path("s3://bucket/a"), "a/b")] == [
        "s3://bucket/a", "s3://bucket/a", "a/b",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    "place", ["ftp://user:planted@host/a", "abfss://c@a.example/f?sig=planted", "file:///a", "hf://a"]
)
def test_other_schemes_are_refused(place: str, kind: type) -> None:
    scheme = place.partition(":")[0]
    with pytest.raises(UserError, match=f"{scheme}:// is not known; use s3://, gs://, az://, .* or a path") as raised:
        url_of(kind(place))
    assert "planted" not in str(raised.value)


def test_what_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a library by its path, a file of another machine, and a folder here whose name ends in a colon."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:").mkdir()
    assert url_of(Path("data:/a")) is None
    assert [url_of(place) for place in ("hf:/models/a", "gpu01:/export/a", Path("c:/a"), "a/b://c")] == [None] * 4


@pytest.mark.parametrize("scheme", ["HTTPS", "s3", "ftp"])
@pytest.mark.parametrize(
    "command",
    [
        ["inspect"], ["verify"], ["report"], ["export", "--format", "hf", "--output", "{output}"],
        ["evaluate", "--corpus", "{output}"], ["fetch", "--output", "{output}", "--input"],
        ["preprocess", "--format", "obelics", "--tokenizer", "clip", "--output", "{output}", "--input"],
    ],
)  # fmt: skip
def test_no_command_says_the_password_of_a_url(
    command: list[str], scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(output=tmp_path / "output") for word in command]
    for place in (f"{scheme}://user:planted@host/a", f"{scheme}:/user:planted@host/a?sig=planted"):
        assert main([*words, place]) in (1, 2)
        printed, complained = capsys.readouterr()
        assert "host" in (said := printed + complained) or f"{scheme}://…" in said
        assert "planted" not in said


def test_nor_does_the_config_of_a_run() -> None:
    with pytest.raises(UserError, match=r"checkpoint.mirror is https:/host; give a URL") as raised:
        configs.load(None, {"checkpoint.mirror": "https:/user:planted@host"})
    assert "planted" not in str(raised.value)


def test_an_endpoint_without_a_scheme_keeps_its_password() -> None:
    """Which is how the object store answers to one."""
    said = explained(RuntimeError("builder error"), "s3://b", "a", {"AWS_ENDPOINT_URL": "user:planted@host:9000"})
    assert said.message == "s3://b: host:9000 is no address of an S3 server; set AWS_ENDPOINT_URL, as http://host:port"
