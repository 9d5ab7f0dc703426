"""A proxy's password is in nothing that a fetch says or writes, also not where the proxy breaks or refuses."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gc
import warnings
from pathlib import Path

import pytest
from data.fetch.faulty_server import EXPECTED, LOGIN, WANTS_CREDENTIALS, serving
from data.fetch.test_fetch import FLAGS, QUICK
from yarl import URL

from megatron_lcl.cli import main
from megatron_lcl.data.fetch.client import Client
from megatron_lcl.data.fetch.settings import PROXY_LOGIN

BROKEN = [f"http://host{k}.example/{kind}/{k}" for k, kind in enumerate(EXPECTED) if kind != "drip"]
LEFT = [f"http://host{k}.example/drip/{k}" for k in range(12)]
"""under way while another is refused"""
CASES = (
    (BROKEN, "given", 0, "dead: connection lost"),
    (["https://host.example/ok/1"], "given", 2, "refuses (status 404)"),  # it takes the login, and makes no tunnels
    ([BROKEN[0], *LEFT, "http://other.example/expired/1"], "given", 2, "refuses (status 407)"),
    ([BROKEN[0], *LEFT, "http://other.example/expired/1"], "by the environment", 2, "refuses (status 407)"),
    (["http://host.example/ok/1"], "wrong", 2, "refuses (status 407)"),
)
"""URLs, which login, exit code, what is said"""


def test_nothing_says_a_proxys_password(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")  # asyncio and aiohttp say all that they have to say
    caplog.set_level("DEBUG")
    user, _, password = LOGIN.partition(":")
    wrong = f"{user}:another-{password}"
    secrets = [password, *(base64.b64encode(login.encode()).decode().rstrip("=")[4:] for login in (LOGIN, wrong))]
    with serving(tmp_path) as (_, port):
        for number, (urls, login, code, said) in enumerate(CASES):
            listed, store = tmp_path / f"{number}.txt", tmp_path / f"store-{number}"
            listed.write_text("\n".join(urls))
            written = "" if login == "by the environment" else f"{wrong if login == 'wrong' else LOGIN}@"
            if not written:
                monkeypatch.setenv(PROXY_LOGIN, LOGIN)
            proxy = f"http://{written}{WANTS_CREDENTIALS}:{port}"
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                assert main(["fetch", str(listed), "--output", str(store), *FLAGS, "--proxy", proxy]) == code
                gc.collect()  # connections that were left say so
            out = "\n".join([*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in warned)])
            assert said in out
            assert f"{WANTS_CREDENTIALS}:{port}" in out or not code
            assert [secret for secret in secrets if secret in out] == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".parquet", ".json", ".log", ".tar"} <= {path.suffix for path in files}
    assert [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)] == []


def test_a_connection_says_no_password(tmp_path: Path) -> None:
    """Its text stands in aiohttp's warning of one that nobody closed, and has all by which it tells them apart."""

    async def text(port: int) -> str:
        proxy = f"http://{LOGIN}@{WANTS_CREDENTIALS}:{port}"
        settings = dataclasses.replace(QUICK, proxy=proxy)
        async with Client(settings) as client, client._get(URL("http://host.example/drip/1")) as response:
            assert response.status == 200
            return repr(response.connection)

    with serving(tmp_path) as (_, port):
        said = asyncio.run(text(port))
        assert f"{WANTS_CREDENTIALS}:{port}" in said
        assert LOGIN.partition(":")[2] not in said
