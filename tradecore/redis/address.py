"""REDIS_URL taken apart: redis://, rediss:// (TLS) or unix:// with user, password and database."""

from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from tradecore.values import Secret, is_loopback

DEFAULT_PORT = 6379

_PATH_MAX_BYTES = 107
_EXAMPLE = "redis://user:password@host:6379/0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where Redis is and who we are there; as text it shows no user and no password."""

    host: str = ""
    port: int = DEFAULT_PORT
    path: str = ""
    """Of a unix socket; host and port mean nothing then."""
    user: str = ""
    password: Secret | None = None
    database: int = 0
    tls: bool = False

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}?db={self.database}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' * self.tls}://{host}:{self.port}/{self.database}"

    @property
    def in_the_clear(self) -> bool:
        """Whether others on the way could read what is sent."""
        return not (self.tls or self.path or is_loopback(self.host))


def checked(text: str) -> Secret:
    """Return the address as a secret; raise ValueError that says what would be right."""
    parse(text)
    return Secret(text)


def parse(text: str) -> Address:
    """Take an address apart; raise ValueError that says what would be right."""
    scheme = text.partition("://")[0]
    if "://" not in text or scheme not in ("redis", "rediss", "unix"):
        raise ValueError("give an address that starts with redis://, rediss:// or unix://")
    try:
        parts = urlsplit(text)
        port, given = parts.port, parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError(f"give an address such as {_EXAMPLE}") from None
    query = dict(given)
    if parts.fragment or len(given) != len(query) or set(query) - {"db"}:
        raise ValueError("give nothing behind ? but db=0, and write # in a password as %23")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if user and not password:
        raise ValueError("give the user with a password, as in user:password@, or :password@")
    secret = Secret(password) if password else None
    if scheme == "unix":
        path = unquote(parts.path)
        if parts.hostname or not 1 < len(path.encode()) <= _PATH_MAX_BYTES:
            raise ValueError("give the whole path of the socket, as in unix:///run/redis.sock")
        database = _database(query.get("db", "0"))
        return Address(path=path, user=user, password=secret, database=database)
    if not parts.hostname:
        raise ValueError(f"give a host, as in {_EXAMPLE}")
    return Address(
        host=parts.hostname,
        port=DEFAULT_PORT if port is None else port,
        user=user,
        password=secret,
        database=_database(query.get("db") or parts.path.strip("/") or "0"),
        tls=scheme == "rediss",
    )


def _database(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise ValueError("give the database as a number, as in redis://host:6379/0")
    return int(text)
