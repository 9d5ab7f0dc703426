"""What went wrong with a request to object storage, in one line that names the remedy and holds no secret.

Nothing of an error is passed on as it came: answers of a server may repeat a request with its keys. Only its HTTP
status and error code, both checked for their form, the addresses that the user gave, and the name of an object are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from megatron_lcl.errors import UserError, without_secrets

KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_STATUS = re.compile(r"(?:status code|status)\W{1,3}([1-5]\d\d)\b")
_LISTED = re.compile(r'\bpath: "((?:[^"\\]|\\.)*)"')
"""the name of an object in obstore's InvalidPathError, with its control characters escaped"""
_CODE = re.compile(r"<Code>\s*([A-Za-z]{3,60})\s*</Code>")
_NOT_TAKEN = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken")
_REDIRECTED = ("Received redirect", "following redirect", "too many redirects")
"""what obstore says then; a name of an object may have the word alone"""
_METADATA = ("/latest/api/token", "/latest/meta-data", "169.254.169.254", "metadata.google.internal", "169.254.170.2")
"""where credentials are asked for on machines in a cloud, once the environment has none"""
_ODD_NAME = (
    "what has //, . or .. between slashes, or a control character in its name cannot be read, and no folder with it "
    "listed; rename it"
)


class StorageError(UserError):
    """A request that failed for good."""

    def __init__(self, message: str, missing: bool = False, remedies: Mapping[str, str] | None = None) -> None:
        super().__init__(message, remedies)
        self.missing = missing
        """there is no such object"""


class Fault(NamedTuple):
    """Why one try failed."""

    message: str
    passing: bool
    """another try may do better"""
    missing: bool = False
    answered: bool = False
    """there is a server, and it may do better later"""
    refused: bool = False
    """the credentials were not taken"""


def endpoint_of(url: str, environment: Mapping[str, str]) -> str:
    """Where requests for a URL go, as the user named it."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.netloc}"
    if parts.scheme == "s3":
        names = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"
        return next((environment[name] for name in names if environment.get(name)), "Amazon S3")
    return {"gs": "Google Cloud Storage", "az": "Azure"}[parts.scheme]


def status_of(error: BaseException) -> int:
    """HTTP's status in an error of obstore; 0 where there is none."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def explained(error: BaseException, url: str, name: str, environment: Mapping[str, str]) -> Fault:
    """An error of obstore at the object `name` below `url`."""
    said, kind = str(error), type(error).__name__
    coded, status = _CODE.search(said), status_of(error)
    code = coded[1] if coded else ""
    endpoint = bare(endpoint_of(url, environment))
    place = f"{url}/{name}".rstrip("/")
    if kind == "InvalidPathError" or said.startswith(("Could not parse path", "Expected string path")):
        listed, parts = _LISTED.search(said), urlsplit(url)
        named = f"{parts.scheme}://{parts.netloc}/{listed[1]}" if listed else f"{url}/{repr(name)[1:-1]}"
        return Fault(f"{named}: {_ODD_NAME}", False)
    if code == "NoSuchBucket":
        return Fault(f"{url}: there is no bucket {urlsplit(url).netloc!r} at {endpoint}; check its name", False)
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        # after a suspend, or early in the start of a machine, a time daemon does so soon
        return Fault(f"{url}: {endpoint} refused the time of this machine ({code}); set its clock (NTP)", True)
    if any(address in said for address in _METADATA):
        return Fault(f"{url}: no credentials; {_remedy(url)}", False)
    if any(words in said for words in _REDIRECTED):
        return Fault(f"{url}: {endpoint} says that the bucket is elsewhere; set AWS_REGION to its region", False)
    if kind == "PreconditionError" or status == 412:
        return Fault(f"{place} was replaced while it was read; begin again with what is there now", False)
    if code in _NOT_TAKEN or status in (401, 403) or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        why = code or f"status {status or 403}"
        said = f"{place}: {endpoint} refused ({why}); {_remedy(url)}, with rights to this place"
        return Fault(said, False, refused=True)
    if isinstance(error, FileNotFoundError) or status == 404:
        return Fault(f"{place} does not exist", False, missing=True)
    if kind == "NotSupportedError" or "Range request not supported" in said:
        return Fault(f"{place}: {endpoint} does not answer requests for a range of bytes; use another server", False)
    if status in (408, 429) or status >= 500:
        said = f"{place}: {endpoint} answers with status {status}{f' ({code})' * bool(code)}; try later"
        return Fault(said, True, answered=True)
    if status:
        return Fault(f"{place}: {endpoint} answers with status {status}{f' ({code})' * bool(code)}", False)
    if isinstance(error, (OSError, ValueError)) and kind not in ("GenericError", "BaseError"):
        return Fault(f"{place}: {kind}", False)
    if "builder error" in said or "URL scheme" in said:
        return Fault(
            f"{url}: {endpoint} is no address of an S3 server; set AWS_ENDPOINT_URL, as http://host:port", False
        )
    return Fault(f"{url}: no whole answer from {endpoint}; {_reach(url)}", True)


def _remedy(url: str) -> str:
    match urlsplit(url).scheme:
        case "s3":
            return f"set {KEYS} (a public bucket: AWS_SKIP_SIGNATURE=true)"
        case "gs":
            return "set GOOGLE_APPLICATION_CREDENTIALS"
        case "az":
            return "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"
    return "the server wants credentials, which http(s):// has none of"


def _reach(url: str) -> str:
    setting = "AWS_ENDPOINT_URL" if url.startswith("s3:") else "the URL"
    return f"check {setting} and the network"


def bare(address: str) -> str:
    """An address without a user, a password, a query or a fragment; also one that lacks its scheme."""
    if "://" not in address:
        address = address.rpartition("@")[2]
    return re.split("[?#]", without_secrets(address))[0]
