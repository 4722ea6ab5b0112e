"""The one TLS context of all connections to the venue."""

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@cache
def tls_context() -> ssl.SSLContext:
    """Return the one context: it verifies certificate and host name, TLS 1.2 or newer.

    Shared by all connections, since each copy would hold the machine's whole list of authorities.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def tls_of(url: str) -> ssl.SSLContext | bool:
    """Return what aiohttp takes as `ssl` for this address: plain HTTP does not need the context,
    whose first making blocks for 25 ms and costs 2 MiB.
    """
    return tls_context() if url.startswith("https:") else True


@contextmanager
def no_authorities() -> Iterator[None]:
    """Let contexts that are made in the body trust nobody.

    aiohttp makes one for its own use when it is imported, and the machine's list of authorities
    costs it 2 MiB and 70 ms. We give it ours with each session; where that were forgotten, no
    certificate would be believed. To be used before there are threads: it changes the environment.
    """
    before = {name: os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
    os.environ.update(dict.fromkeys(before, os.devnull))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
