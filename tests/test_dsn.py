import ssl
from inspect import signature
from pathlib import Path

import pytest
from asyncpg.connect_utils import _parse_connect_dsn_and_args

from tradecore.errors import StoreError
from tradecore.store.dsn import parse_dsn


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PGHOST", "PGPORT", "PGSSLMODE", "PGSSLROOTCERT", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def read_by_asyncpg(text: str) -> tuple[object, ...]:
    """What asyncpg makes of a DSN: the oracle."""
    nothing = dict.fromkeys(signature(_parse_connect_dsn_and_args).parameters)
    addresses, found = _parse_connect_dsn_and_args(**{**nothing, "dsn": text})
    return (addresses, found.user, found.password, found.database, found.server_settings)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql://u:p@localhost/d", "postgresql://u:***@localhost/d"),
        ("postgres://u@localhost:5433/d", "postgresql://u@localhost:5433/d"),
        ("postgresql://u:p%40%2F%3A@127.0.0.1:5432/d", "postgresql://u:***@127.0.0.1:5432/d"),
        ("postgresql://u:a:b@localhost/d", "postgresql://u:***@localhost/d"),
        ("postgresql://u:p@[::1]:5432/d", "postgresql://u:***@[::1]:5432/d"),
        (
            "postgresql://u:p@localhost:1,127.0.0.1:2/d",
            "postgresql://u:***@localhost:1,127.0.0.1:2/d",
        ),
        ("postgresql://u@/d?host=/run/pg&port=5432", "postgresql://u@/d?host=/run/pg&port=5432"),
        ("postgresql:///d?host=/run/pg&user=u", "postgresql://u@/d?host=/run/pg"),
        ("postgresql://u@%2Frun%2Fpg/d", "postgresql://u@%2Frun%2Fpg/d"),
        (
            "postgresql://localhost/d?user=u&password=geheim&application_name=x%20y",
            "postgresql://u:***@localhost/d",
        ),
        (
            "postgresql://u:p@localhost/d?options=-c%20search_path%3Da&statement_timeout=9s",
            "postgresql://u:***@localhost/d",
        ),
        (
            "postgresql://u:p@localhost/%C3%BC?sslmode=disable",
            "postgresql://u:***@localhost/%C3%BC",
        ),
    ],
)
def test_a_good_dsn_reaches_asyncpg_unchanged(text: str, masked: str) -> None:
    dsn = parse_dsn(f" {text}\n")
    assert read_by_asyncpg(dsn.text) == read_by_asyncpg(text)
    assert str(dsn) == dsn.masked == masked
    assert dsn.warnings == ()


def test_settings_for_the_server() -> None:
    dsn = parse_dsn("postgresql://u@localhost/d?search_path=a&sslmode=disable&dbname=x")
    assert dsn.settings == {"search_path": "a"}
    assert dsn.arguments() == {"dsn": dsn.text}


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "postgresql://user:password@host:5432/name"),
        ("host=db user=u password=geheim", "postgresql://user:password@host:5432/name"),
        ("mysql://u:geheim@db/d", "mysql://"),
        ("postgresql+asyncpg://u:geheim@db/d", "postgresql://"),
        ("postgresql://u:ge@heim@db/d", "%40"),
        ("postgresql://u:ge/heim@db/d", "%2F"),
        ("postgresql://u:1/geheim@db/d", "%2F"),
        ("postgresql://u:ge?heim@db/d", "name=value"),
        ("postgresql://u:ge?heim=x@db/d", "%3F"),
        ("postgresql://u:ge#heim@db/d", "%23"),
        ("postgresql://u:ge%heim@db/d", "%25"),
        ("postgresql://u:ge heim@db/d", "%20"),
        ("postgresql://u:ge[heim@db/d", "%5B"),
        ("postgresql://u:geheim@db:54x/d", "65535"),
        ("postgresql://u:geheim@db:0/d", "65535"),
        ("postgresql://u:geheim@db:65536/d", "65535"),
        ("postgresql://u:geheim@:5432/d", "host"),
        ("postgresql://u:geheim@::1/d", "brackets"),
        ("postgresql://u:geheim@[::1/d", "host"),
        ("postgresql://u:geheim@db,/d", "host"),
        ("postgresql://u:geheim@db/d?port=x", "65535"),
        ("postgresql://u:geheim@db/d?sslmode=on", "verify-full"),
        ("postgresql://u:geheim@db/d?sslmode", "name=value"),
        ("postgresql://u:geheim@db/d?sslmode=require&sslrootcert=system", "verify-full"),
        ("postgresql://u:geheim@db/d?sslmode=verify-ca", "sslrootcert=/path"),
        (f"postgresql://u:geheim@db/d?sslmode=verify-full&sslrootcert={__file__}", "PEM"),
        ("postgresql://u:geheim@db/d?ssl_min_protocol_version=TLSv1", "TLSv1.2"),
        ("postgresql://u:geheim@db/d?sslrootcert=/nowhere/root.crt", "/nowhere/root.crt"),
        ("postgresql://u:geheim@db/d?sslrootcert=system&sslcert=/nowhere/c.crt", "/nowhere/c.crt"),
    ],
)
def test_a_wrong_dsn_is_explained_without_the_password(text: str, remedy: str) -> None:
    with pytest.raises(StoreError) as caught:
        parse_dsn(text)
    assert remedy in str(caught.value)
    assert "heim" not in str(caught.value).replace("geheim@db", "")
    assert "\n" not in str(caught.value)


def test_no_secret_in_any_text_of_it() -> None:
    dsn = parse_dsn("postgresql://u:geheim@db/d?password=geheim&sslpassword=geheim")
    assert "geheim" in dsn.text
    assert "geheim" not in f"{dsn} {dsn!r} {dsn.warnings}"


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("postgresql://u@db.example/d", True),
        ("postgresql://u@10.0.0.1/d?sslmode=require", True),
        ("postgresql://u@localhost,db.example/d?sslmode=disable", True),
        ("postgresql://u@db.example/d?sslmode=verify-full&sslrootcert=system", False),
        ("postgresql://u@127.8.0.1/d", False),
        ("postgresql://u@[::1]/d", False),
        ("postgresql://u@/d?host=/run", False),
        ("postgresql://u@/d", False),
    ],
)
def test_unverified_connections_are_warned_of(text: str, warned: bool) -> None:
    assert any("not verified" in warning for warning in parse_dsn(text).warnings) == warned


def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db.example")
    assert "db.example" in parse_dsn("postgresql:///d").warnings[0]
    monkeypatch.setenv("PGSSLMODE", "nonsense")
    with pytest.raises(StoreError, match="sslmode=nonsense"):
        parse_dsn("postgresql:///d")


def test_the_certificate_store_of_the_machine() -> None:
    dsn = parse_dsn("postgresql://u@db.example/d?sslrootcert=system")
    context = dsn.arguments()["ssl"]
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert "sslrootcert" not in dsn.text
    assert parse_dsn("postgresql://u@/d?host=/run&sslrootcert=system").ssl is None


def test_without_an_authority_the_machines_store_is_taken_and_said() -> None:
    dsn = parse_dsn("postgresql://u@db.example/d?sslmode=verify-full")
    assert dsn.arguments()["ssl"].check_hostname
    assert [warning[:34] for warning in dsn.warnings] == [
        "DATABASE_URL names no sslrootcert: "[:34]
    ]


def test_an_authority_without_a_mode_verifies_nothing() -> None:
    (warning,) = parse_dsn(f"postgresql://u@db.example/d?sslrootcert={__file__}").warnings
    assert warning.endswith("add sslmode=verify-full")


def test_what_only_libpq_knows_is_left_out() -> None:
    dsn = parse_dsn("postgresql://u@localhost/d?connect_timeout=3&channel_binding=require")
    assert dsn.text == "postgresql://u@localhost/d"
    assert [warning.split()[0] for warning in dsn.warnings] == [
        "connect_timeout",
        "channel_binding",
    ]
