"""What a message may hold of a URL."""

from __future__ import annotations

import pytest

from megatron_lcl.errors import complain, without_secrets

PRESIGNED = "https://b.s3.amazonaws.com/k?X-Amz-Credential=SECRET%2F1&X-Amz-Signature=SECRET&partNumber=3"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "asked http://user:SECRET@host:80/x?token=SECRET: url: /x?token=SECRET&page=2 (refused)",
            "asked http://host:80/x?token=… url: /x?token=…&page=2 (refused)",
        ),
        (PRESIGNED, "https://b.s3.amazonaws.com/k?X-Amz-Credential=…&X-Amz-Signature=…&partNumber=3"),
        ("gs://b/k?X-Goog-Signature=SECRET", "gs://b/k?X-Goog-Signature=…"),
        ("'az://c/k?sv=2024&sig=SECRET', 'next'", "'az://c/k?sv=2024&sig=…', 'next'"),
        ("https://h/k?Policy=SECRET&Signature=SECRET&Key-Pair-Id=K", "https://h/k?Policy=…&Signature=…&Key-Pair-Id=…"),
        ("https://h/k?AWSAccessKeyId=SECRET&amp;Expires=3", "https://h/k?AWSAccessKeyId=…&amp;Expires=3"),
        ("https://h/#access_token=SECRET&state=1", "https://h/#access_token=…&state=1"),
        ("https://h/k?password=SECRET&client_secret=SECRET", "https://h/k?password=…&client_secret=…"),
        ("FTP://user:SECRET@h/x and s3:/user:SECRET@b", "FTP://h/x and s3:/b"),  # a Path has one slash
        ("http://user:SEC/RET@h/x, http://user:SEC#RET@h/x", "http://h/x, http://h/x"),  # not escaped
        ("http://user:SEC@RET@h/x, http://user:SE/C@RET@h/x", "http://h/x, http://h/x"),
        ("s3:///user:SECRET@b/x and ftp:/user:SECRET@h", "s3:///b/x and ftp:/h"),
        ("https://h/k;token=SECRET;page=2", "https://h/k;token=…;page=2"),
    ],
)
def test_secrets_of_urls_are_left_out(text: str, left: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert without_secrets(text) == left
    complain(text)
    assert capsys.readouterr().err == f"{left}\n"


def test_a_complaint_has_no_sequences_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    complain("a \x1b]52;c;aGk=\x07 b\rc")
    assert capsys.readouterr().err == "a \\x1b]52;c;aGk=\\x07 b\\x0dc\n"


KEYS = """x-amz-security-token x-goog-credential x-ms-copy-source-authorization sig auth authorization pwd pass key
GoogleAccessId passwd db_password refresh_token credential credentials api_key api-key apikey accessKey access_key_id
secretAccessKey"""


@pytest.mark.parametrize("key", KEYS.split())
def test_the_value_of_a_key_that_is_a_credential_is_left_out(key: str) -> None:
    assert without_secrets(f"https://h/k?a=1&{key}=SECRET&page=2") == f"https://h/k?a=1&{key}=…&page=2"


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/@scope/name?page=2&author=a&tokenizer=clip",
        "http://[::1]:80/a@b",
        "PATH=/a:/b@c/bin, gpu01:/export/a@b; write to a@b.c",
        "s3://bucket/folder/step-00000010: see #section, --key=value",
        '{"url":"https://host","email":"x@y.z"}',
        "https://h1:8080,a@b",
        "https://host:/a@b",
        "nas-s3:/vol@snap/x",
        "nfs1:/vol@snap/x, PATH=/usr/bin:/b@c/bin",
    ],
)
def test_all_else_stays(text: str) -> None:
    assert without_secrets(text) == text
