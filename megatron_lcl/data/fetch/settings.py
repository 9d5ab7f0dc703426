"""What a fetch does and how politely."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_lcl.errors import UserError

AGENT = "megatron-lcl/1.0"
Store = Literal["tar", "parquet"]
STORES: tuple[Store, ...] = get_args(Store)
PROXY_LOGIN = "MEGATRON_LCL_PROXY_LOGIN"
"""environment variable with user:password of a proxy that is given without them"""
_HOST = r"(?:[^/?#@:\s\[\]]+|\[[0-9a-fA-F:]+\])(?::\d{1,5})?"
_PROXY = re.compile(rf"http://(?:([^/?#@\s]*)@)?({_HOST})")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one run. The first three decide what is stored, and may not change from run to run of a store."""

    max_image_side: int | None = None
    """pixels; images with a longer side are scaled down and encoded again"""
    shard_urls: int = 10_000
    """rows of a shard's table, at most"""
    store: Store = "tar"
    """what holds the images: tars beside the tables, or the tables themselves"""
    max_bytes: int = 32 << 20
    """of a response; longer ones are refused"""
    max_pixels: int = 89_478_485
    """width times height, before anything is decoded; as many as a corpus takes (`probe.MAX_PIXELS`)"""
    timeout: float = 30.0
    """seconds of one request, from its start to its last byte"""
    retries: int = 2
    """further tries of a URL after a lost connection, a timeout, or status 408, 429, 500, 502, 503, 504"""
    backoff: float = 1.0
    """seconds before the first retry, doubled for each further one, times 0.5 to 1.5; Retry-After is kept if longer"""
    concurrency: int = 128
    """requests at a time of one process"""
    per_host: int = 4
    """requests at a time of one host"""
    delay: float = 0.1
    """seconds between the starts of requests to one host, at least; robots.txt's Crawl-delay if longer"""
    proxy: str | None = field(default=None, repr=False)
    """http://[user:password@]host:port for all requests"""
    allow_private: bool = False
    """also connect to addresses that are not public"""
    user_agent: str = AGENT
    """the header; its name before the slash is what robots.txt and X-Robots-Tag may name"""


def proxy_parts(proxy: str) -> tuple[str, str]:
    """`host:port` of a proxy, and `user:password`, its own or the environment's, or "".

    UserError, without them, where one of the two is malformed.
    """
    if (found := _PROXY.fullmatch(proxy)) is None:
        named = _without_login(proxy)
        raise UserError(f"--proxy{named and f' {named}'}: give http://host:port")
    login = os.environ.get(PROXY_LOGIN, "") if found[1] is None else found[1]
    if not _PROXY.fullmatch(f"http://{login}@{found[2]}"):
        raise UserError(f"{PROXY_LOGIN} is not user:password as in a URL: write @ as %40, / as %2F, # as %23, ? as %3F")
    return found[2], login


def _without_login(proxy: str) -> str:
    """What of a malformed proxy is surely no user and no password: scheme and host, or ""."""
    scheme, slashes, rest = proxy.rpartition("://")
    host = re.split("[/?#]", rest.rpartition("@")[2], maxsplit=1)[0]
    return f"{scheme}{slashes}{host}" if re.fullmatch(r"\w*", scheme) and re.fullmatch(_HOST, host) else ""
