"""Reads DATABASE_URL before asyncpg does, so that a mistake is a sentence and never a leak.

asyncpg takes the first '@' for the end of the password: one that is not written %40 would turn
the rest of the password into a host name and send it to a name server.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from ssl import PROTOCOL_TLS_CLIENT, SSLContext, TLSVersion, create_default_context
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from tradecore.errors import StoreError

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile")
_CONNECTION_PARAMETERS = {
    *("host", "port", "user", "password", "dbname", "database", "service", "sslmode"),
    *("sslnegotiation", "sslpassword", "ssl_min_protocol_version", "ssl_max_protocol_version"),
    *("target_session_attrs", "krbsrvname", "gsslib", *_FILES),
}
_IGNORED = {
    *("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval"),
    *("keepalives_count", "channel_binding", "gssencmode", "sslcompression", "sslsni"),
    *("fallback_application_name", "load_balance_hosts", "client_encoding", "require_auth"),
    *("requirepeer", "gssdelegation", "sslcertmode"),
}
"""Parameters of libpq that asyncpg would hand to the server, which refuses them."""


@dataclass(frozen=True, slots=True)
class Dsn:
    """A checked DSN. `str()` and `repr()` hold no secret."""

    text: str = field(repr=False)
    """What asyncpg takes, password and all."""
    masked: str
    """For logs and people: postgresql://user:***@host:port/name."""
    hosts: tuple[str, ...]
    """Host names, addresses or socket folders; empty for the local socket."""
    settings: Mapping[str, str]
    """Server settings that the DSN asks for, such as search_path."""
    ssl: SSLContext | None = field(repr=False)
    """Set when asyncpg cannot make it from the text (sslrootcert=system)."""
    warnings: tuple[str, ...]
    """Sentences for the log: what is ignored, what is not safe."""

    def __str__(self) -> str:
        return self.masked

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `asyncpg.connect` and `asyncpg.create_pool`."""
        return {"dsn": self.text} if self.ssl is None else {"dsn": self.text, "ssl": self.ssl}


def parse_dsn(text: str) -> Dsn:
    """Check `text`, a PostgreSQL URL, and return what to connect with.

    Raises StoreError that says what is wrong and what would be right, without the text itself.
    """
    text = text.strip()
    url = _split(text)
    auth, _, hostspec = url.netloc.rpartition("@")
    query = _query(url.query)
    hosts = _hosts(hostspec or query.get("host") or os.environ.get("PGHOST", ""))
    for port in filter(None, query.get("port", "").split(",")):
        _check_port(port)
    mode = query.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer"
    if mode not in _SSL_MODES:
        raise _wrong(f"sslmode={mode} does not exist, it is one of {', '.join(_SSL_MODES)}")
    remote = [host for host in hosts if not _is_local(host)]
    warnings = [f"{name} in DATABASE_URL is ignored" for name in query if name in _IGNORED]
    query = {name: value for name, value in query.items() if name not in _IGNORED}

    for name in _FILES:
        if query.get(name, "system") != "system" and not os.access(query[name], os.R_OK):
            raise _wrong(f"{name}={query[name]} is no readable file")
    _check_version(query)
    context = None
    over_tcp = not hosts or any(not host.startswith("/") for host in hosts)
    if query.get("sslrootcert") == "system":
        del query["sslrootcert"]
        if query.pop("sslmode", "verify-full") != "verify-full":
            raise _wrong("sslrootcert=system goes with sslmode=verify-full only")
        mode = "verify-full"
        context = _system_context(query) if over_tcp else None
    elif mode.startswith("verify") and over_tcp:
        if authority := _authority(query):
            _check_certificate("sslrootcert", authority)
        elif mode == "verify-ca":
            raise _wrong("sslmode=verify-ca needs sslrootcert=/path/of/root.crt")
        else:
            query.pop("sslmode", None)
            context = _system_context(query)
            warnings.append(
                "DATABASE_URL names no sslrootcert: the authorities of this machine are trusted;"
                " say so with sslrootcert=system, or name the one that signed the server's"
                " certificate"
            )
    if remote and mode != "verify-full":
        known = "" if query.get("sslrootcert") else "&sslrootcert=system"
        warnings.append(
            f"the database at {', '.join(remote)} is not verified (sslmode={mode}): anyone on the"
            f" way can read and change what is stored; add sslmode=verify-full{known}"
        )
    return Dsn(
        text=f"{url.scheme}://{url.netloc}{url.path}?{urlencode(query, quote_via=quote)}".rstrip(
            "?"
        ),
        masked=_mask(auth, hostspec, url.path, query),
        hosts=tuple(hosts),
        settings={n: v for n, v in query.items() if n not in _CONNECTION_PARAMETERS},
        ssl=context,
        warnings=tuple(warnings),
    )


def _wrong(problem: str) -> StoreError:
    return StoreError(f"DATABASE_URL is wrong: {problem}")


def _split(text: str) -> SplitResult:
    """Take the URL apart; raise for what a stray character in a password does to it."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise _wrong("it is no URL; write postgresql://user:password@host:5432/name")
    if scheme.partition("+")[0] in ("postgresql", "postgres") and "+" in scheme:
        raise _wrong(f"write postgresql:// in place of {scheme}://")
    if scheme not in ("postgresql", "postgres"):
        raise _wrong(f"it begins with {scheme[:20]}://, not with postgresql://")
    if re.search(r"[\s\x00-\x1f]", text):
        raise _wrong("it holds white space; write %20 for a space")
    if re.search(r"%(?![0-9a-fA-F]{2})", text):
        raise _wrong("a % in it is no escape; write %25 for the character itself")
    if "#" in text:
        raise _wrong("it holds a #; write %23 for it")
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    if authority.count("@") > 1:
        raise _wrong("it holds more than one @; write %40 for one in the user or password")
    if "@" not in authority and "@" in rest.partition("?")[0]:
        raise _wrong("there is a / before the @; write %2F for one in the user or password")
    if re.search(r"[\[\]]", authority.partition("@")[0]) and "@" in authority:
        raise _wrong("it holds [ or ] in the user or password; write %5B and %5D for them")
    try:
        return urlsplit(text)
    except ValueError:
        raise _wrong("its host part cannot be read; write user:password@host:5432") from None


def _query(text: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
    except ValueError:
        raise _wrong("what follows the ? is not name=value&name=value") from None
    return {name: value for name, value in pairs if value}


def _hosts(hostspec: str) -> list[str]:
    """Return the hosts of a comma list of host, host:port, [address]:port or /folder."""
    hosts = []
    for spec in hostspec.split(",") if hostspec else []:
        match = re.fullmatch(r"(/.*|%2[fF].*|\[[^\]]+\]|[^:\[\]]*)(?::(.*))?", spec)
        if match is None or not match[1]:
            raise _wrong("a host in it cannot be read; an IPv6 address goes in brackets")
        if match[2] is not None and not match[1].startswith("/"):
            _check_port(match[2])
        hosts.append(unquote(match[1].strip("[]")))
    return hosts


def _check_port(text: str) -> None:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise _wrong(
            "a port is no number from 1 to 65535; write %2F and %3F for / and ? in a password"
        )


def _is_local(host: str) -> bool:
    if host.startswith("/") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _system_context(query: Mapping[str, str]) -> SSLContext:
    """Return a context that trusts the machine's certificate store and checks the host name."""
    context = create_default_context()
    context.minimum_version = TLSVersion.TLSv1_2
    context.set_alpn_protocols(["postgresql"])
    certificate = query.get("sslcert") or os.environ.get("PGSSLCERT")
    if certificate:
        key = query.get("sslkey") or os.environ.get("PGSSLKEY")
        try:
            context.load_cert_chain(certificate, key, lambda: query.get("sslpassword", ""))
        except OSError as exc:
            raise _wrong(f"sslcert={certificate} cannot be used: {exc}") from exc
    return context


def _authority(query: Mapping[str, str]) -> str | None:
    """Return the file of the authority that libpq and asyncpg would take."""
    given = query.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    usual = Path("~/.postgresql/root.crt").expanduser()
    return given or (str(usual) if usual.exists() else None)


def _check_certificate(name: str, path: str) -> None:
    try:
        SSLContext(PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as exc:
        raise _wrong(f"{name}={path} holds no certificate in PEM form ({exc})") from None


def _check_version(query: Mapping[str, str]) -> None:
    for name in ("ssl_min_protocol_version", "ssl_max_protocol_version"):
        given = query.get(name) or os.environ.get(f"PG{name.replace('_', '').upper()}", "TLSv1.2")
        if given not in ("TLSv1.2", "TLSv1.3"):
            raise _wrong(f"{name}={given} is not safe; give TLSv1.2 or TLSv1.3, or take it out")


def _mask(auth: str, hostspec: str, path: str, query: Mapping[str, str]) -> str:
    user, _, password = auth.partition(":")
    user = user or quote(query.get("user", ""))
    secret = ":***" if password or "password" in query else ""
    name = path.strip("/") or query.get("dbname") or query.get("database") or ""
    shown = f"postgresql://{user}{secret}{'@' if user or secret else ''}{hostspec}/{name}"
    where = {n: query[n] for n in ("host", "port", "service") if n in query}
    return f"{shown}?{urlencode(where, safe='/,:')}" if where else shown
