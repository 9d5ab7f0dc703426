"""Weights that a name stands for: on a hub, which may be out of reach, or in its cache on this machine.

The libraries try a hub that does not answer again and again, for a minute and more. Here its host is asked once,
within LIMIT seconds, before anything is loaded. If it does not answer, the load goes by the cache alone; what is not
there ends with one line that names what can be given instead. A download from a hub that answers takes its time.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from megatron_lcl.convert.libraries import SETTINGS
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_file

LIMIT = 1.0
"""seconds, where HF_HUB_ETAG_TIMEOUT, the hub's own variable, does not say another number"""


@dataclass(frozen=True)
class Remote:
    """A file that a load fetches, unless it was fetched before."""

    url: str
    instead: str
    """what the user can give in its place"""
    cached: Path | None = None
    """where it lies then; None: in the cache of huggingface_hub, which knows itself"""


def hub_file(repository: str, file: str, instead: str) -> Remote:
    """A file of a repository (`OWNER/NAME` or `OWNER/NAME@REVISION`) of the Hugging Face hub."""
    from huggingface_hub import hf_hub_url

    name, _, revision = repository.partition("@")
    return Remote(hf_hub_url(name, file, revision=revision or None), instead)


def optional_file(repository: str, file: str) -> Path | None:
    """A file of a repository of the hub, fetched or from the cache; None: the repository has none, as the hub says now
    or, where it is not asked (`by_cache_alone`), has said before. LocalEntryNotFoundError where it never was asked.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file))
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(repository, file) is _CACHED_NO_EXIST:
            return None
        raise
    except EntryNotFoundError:
        return None


def out_of_reach(remote: Remote) -> str | None:
    """Why the file's host cannot be used: it does not answer in time, or says that it cannot; None: it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    limit = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or LIMIT)
    parts = urlsplit(remote.url)
    host = f"{parts.scheme}://{parts.netloc}"
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with SETTINGS:  # a load by the cache alone, in another thread, forbids the hub's client to ask
        if remote.cached is None and constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE forbids to ask the hub"
        session = get_session()  # with the hub's proxies and certificates, which take their time to be read
        # in a thread: resolving a name has no time limit of its own
        Thread(target=lambda: answers.put(_ask(session, remote.url, 2 * limit)), daemon=True).start()
        try:
            said = answers.get(timeout=limit)
        except queue.Empty:
            return f"{host} has not answered for {limit:g} s (HF_HUB_ETAG_TIMEOUT=SECONDS waits longer)"
    return said and f"{host} cannot be reached ({said})"


def _ask(session: Any, url: str, timeout: float) -> str | None:
    """What goes wrong when the host is asked for the file's header; None: it answers, if only that it has no file."""
    try:
        status = session.head(url, timeout=timeout).status_code
    except Exception as error:  # noqa: BLE001 - the hub's client is of another HTTP library in each of its versions
        return " ".join(str(error).split()) or type(error).__name__
    return f"HTTP status {status}" if status == 429 or status >= 500 else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextlib.contextmanager
def by_cache_alone(spec: str, remote: Remote, fault: str) -> Iterator[None]:
    """The libraries take what the cache has; UserError where it lacks something."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cache = constants.HF_HUB_CACHE if remote.cached is None else remote.cached.parent
    missing = UserError(
        f"{spec}: {fault}, and its files are not all in the cache {cache}; {remote.instead}; or copy that cache from a "
        "machine that has it" + (" (HF_HOME says where it lies)" if remote.cached is None else "")
    )
    if remote.cached is not None:
        if not is_file(remote.cached):
            raise missing
        yield
        return
    with SETTINGS:
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
        try:
            yield
        except Exception as error:
            if any(isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled) for cause in causes(error)):
                raise missing from None
            raise
        finally:
            constants.HF_HUB_OFFLINE = before
