"""One S3 server for the tests of this process, behind the proxy that plants faults."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from s3_server import Proxy, moto, proxied


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Proxy]:
    from megatron_lcl.data.storage import store

    with moto() as port, proxied(port) as proxy:
        with urlopen(Request(f"{proxy.url}/bucket", method="PUT"), timeout=60) as answer:
            assert answer.status == 200
        yield proxy
        if (server := store._server) is not None:  # that of this process's own requests: or Python says it still runs
            server.process.stdin.close()
            server.process.wait(20)


@pytest.fixture
def s3(s3_server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Without faults, and with the environment of somebody who may use it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA0PLANTED0KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/secret/of/the/tests")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3_server.reset()
    yield s3_server
    s3_server.reset()


@pytest.fixture
def place(s3: Proxy) -> str:
    """A folder of objects that no other test has."""
    return f"s3://bucket/{uuid.uuid4().hex}"


def upload(folder: Path, place: str) -> str:
    """A folder's files as objects; their place."""
    from megatron_lcl.data.storage.store import Store

    for file in sorted(folder.iterdir()):
        Store(place).put(file.name, file)
    return place


def readable_by_all(s3: Proxy, place: str) -> str:
    """Let everybody read the objects there, without credentials; the http:// URL of their folder."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3.url, region_name="us-east-1")
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    for found in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]:
        client.put_object_acl(Bucket=bucket, Key=found["Key"], ACL="public-read")
    return f"{s3.url}/{bucket}/{prefix}"
