import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tradecore.errors import EXIT_USAGE, SettingsError
from tradecore.settings import VARIABLES, Settings, describe, http_address, load
from tradecore.values import Secret, is_loopback


def problems(**environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(environ)
    assert caught.value.exit_code == EXIT_USAGE
    return caught.value.problems


def problem(**environ: str) -> str:
    (only,) = problems(**environ)
    return only


def test_defaults() -> None:
    assert load({}) == Settings()
    settings = load({})
    assert settings.database_url is None
    assert settings.db_pool_size == 20
    assert settings.batch_size == 100
    assert settings.batch_timeout_ms == 1000
    assert settings.websocket_urls == ("wss://stream.binance.com:9443",)
    assert settings.rest_url == "https://api.binance.com"
    assert settings.symbols == (
        *("BTCUSDT", "ETHUSDT", "BNBUSDT", "SOLUSDT", "ADAUSDT", "XRPUSDT", "DOGEUSDT"),
    )
    assert settings.streams == ("trade", "ticker", "kline_1m")
    assert settings.reconnect_delay_ms == 1000
    assert settings.max_reconnect_delay_ms == 30000
    assert settings.log_level == "info"
    assert settings.log_format == "auto"
    assert settings.data_dir == Path("data")
    assert settings.ring_capacity == 1 << 20
    assert (settings.http_host, settings.http_port) == ("127.0.0.1", 3000)
    assert settings.auto_migrate is True
    assert settings.feed_lines == 1
    assert settings.backfill_max_age_s == 86400
    assert settings.redis_url is None
    assert settings.cors_origins == ()
    assert (settings.http_token, settings.http_auth, settings.http_hosts) == (None, "token", ())
    assert settings.retention_s == 2 * 365 * 86400
    assert settings.compress_after_s == 7 * 86400


def test_empty_counts_as_unset() -> None:
    assert load(dict.fromkeys((v.name for v in VARIABLES.values()), " ")) == Settings()


def test_the_seeds_settings_are_taken_as_they_stand() -> None:
    settings = load(
        {
            "DATABASE_URL": "postgresql://trading_user:trading_password@localhost:5432/platform",
            "DB_POOL_SIZE": "20",
            "BATCH_SIZE": "100",
            "BATCH_TIMEOUT": "1000",
            "BINANCE_WEBSOCKET_URL": "wss://stream.binance.com:9443/ws/",
            "SUPPORTED_SYMBOLS": "BTCUSDT,ETHUSDT,BNBUSDT,SOLUSDT,ADAUSDT,XRPUSDT,DOGEUSDT",
            "RECONNECT_DELAY": "1000",
            "MAX_RECONNECT_DELAY": "30000",
            "LOG_LEVEL": "debug",
            "LOG_FORMAT": "json",
        }
    )
    assert settings.websocket_urls == ("wss://stream.binance.com:9443",)
    assert settings.log_level == "debug"


def test_every_wrong_value_in_one_go() -> None:
    wrong = {
        "DATABASE_URL": "mysql://u:hunter2@h/d",
        "SUPPORTED_SYMBOLS": "BTC/USDT",
        "STREAMS": "kline",
        "BINANCE_WEBSOCKET_URL": "stream.binance.com",
        "BINANCE_REST_URL": "http://api.binance.com",
        "BINANCE_DUMP_URL": "ftp://data.binance.vision",
        "FEED_LINES": "3",
        "RECONNECT_DELAY": "1s",
        "MAX_RECONNECT_DELAY": "-1",
        "CONNECTION_MAX_AGE": "25h",
        "DATA_DIR": "~nobody-of-this-name/data",
        "RING_CAPACITY": "1000000",
        "BATCH_SIZE": "0",
        "BATCH_TIMEOUT": "1e3",
        "DB_POOL_SIZE": "twenty",
        "AUTO_MIGRATE": "maybe",
        "BACKFILL_MAX_AGE": "24",
        "SHARDS": "1025",
        "NODE_NAME": "a b",
        "RETENTION": "2 decades",
        "COMPRESS_AFTER": "5 min",
        "HTTP_HOST": "not a host",
        "HTTP_PORT": "65536",
        "HTTP_HOSTS": "*.example",
        "HTTP_TOKEN": "hunter2",
        "HTTP_AUTH": "none",
        "CORS_ORIGINS": "*",
        "REDIS_URL": "memcached://h",
        "REDIS_TRADES": "all",
        "LOG_LEVEL": "loud",
        "LOG_FORMAT": "xml",
    }
    others = {variable.name for variable in VARIABLES.values()} - {"SETTINGS_FILE"}
    assert wrong.keys() == others
    del wrong["BATCH_SIZE"]
    found = problems(**wrong, BATCH_SIZ="1", SETTINGS_FILE="/nowhere/tradecore.env")
    assert [line.split(" ")[0] for line in found] == ["SETTINGS_FILE", "BATCH_SIZ", *wrong]
    assert not any("hunter2" in line for line in found)
    assert "did you mean kline_1m?" in found[4]
    assert "the next one is 1048576" in "".join(found)


def test_settings_file_wins_over_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "tradecore.env"
    path.write_text(
        "# symbols of this host\n\nexport SUPPORTED_SYMBOLS = ETHUSDT,BTCUSDT\nLOG_LEVEL='debug'\n"
    )
    environ = {"SETTINGS_FILE": str(path), "SUPPORTED_SYMBOLS": "BNBUSDT", "BATCH_SIZE": "7"}
    settings = load(environ)
    assert settings.symbols == ("ETHUSDT", "BTCUSDT")
    assert (settings.log_level, settings.batch_size) == ("debug", 7)
    path.write_text("SUPPORTED_SYMBOLS=SOLUSDT\nHTTP_PORT=4000")
    assert load(environ).symbols == ("SOLUSDT",)
    assert http_address(environ) == ("127.0.0.1", 4000)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("SUPPORTED_SYMBOLS", "line 1: give NAME=value"),
        ("LANG=C\n=x", "line 2: give NAME=value"),
        ("", "is empty"),
        ("LOG_LEVEL=loud", "LOG_LEVEL is 'loud'"),
        ("LOG_LEVLE=info", "did you mean LOG_LEVEL?"),
        ("LOG_LEVEL=info\nLOG_LEVLE=info", "LOG_LEVLE in SETTINGS_FILE is no setting"),
        ("RINGS=7", "RINGS in SETTINGS_FILE is no setting of tradecore: take it out"),
    ],
)
def test_settings_file_refused(tmp_path: Path, text: str, right: str) -> None:
    path = tmp_path / "tradecore.env"
    path.write_text(text)
    assert right in problem(SETTINGS_FILE=str(path))


def test_several_websocket_urls() -> None:
    settings = load({"BINANCE_WEBSOCKET_URL": "wss://a/ws, wss://b:9443 ,wss://a/stream"})
    assert settings.websocket_urls == ("wss://a", "wss://b:9443")
    assert "wss://" in problem(BINANCE_WEBSOCKET_URL="wss://a,b")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("BATCH_SIZ", "BATCH_SIZE"),
        ("BATCHSIZE", "BATCH_SIZE"),
        ("BATCH_TIMOUT", "BATCH_TIMEOUT"),
        ("batch_size", "BATCH_SIZE"),
        ("SUPORTED_SYMBOLS", "SUPPORTED_SYMBOLS"),
        ("SUPPORTED_SYMBOL", "SUPPORTED_SYMBOLS"),
        ("SUPPORTED_SYBMOLS", "SUPPORTED_SYMBOLS"),
        ("DATABASE_ULR", "DATABASE_URL"),
        ("DATABSE_URL", "DATABASE_URL"),
        ("DATABASE_URL_FIEL", "DATABASE_URL_FILE"),
        ("DB_POOLSIZE", "DB_POOL_SIZE"),
        ("BINANCE_WEBSOCKETS_URL", "BINANCE_WEBSOCKET_URL"),
        ("BINANCE_RESTURL", "BINANCE_REST_URL"),
        ("MAX_RECONECT_DELAY", "MAX_RECONNECT_DELAY"),
        ("LOG_LEVL", "LOG_LEVEL"),
        ("LOG_FORMATT", "LOG_FORMAT"),
        ("HTTP_PROT", "HTTP_PORT"),
        ("RETENSION", "RETENTION"),
        ("CORS_ORIGIN", "CORS_ORIGINS"),
        ("AUTOMIGRATE", "AUTO_MIGRATE"),
        ("RING_CAPASITY", "RING_CAPACITY"),
        ("FEED_LINE", "FEED_LINES"),
        ("TRADECORE_BATCH_SIZE", "BATCH_SIZE"),
    ],
)
def test_misspelt_names_are_errors_with_a_suggestion(wrong: str, right: str) -> None:
    assert problem(**{wrong: "1"}) == f"{wrong} is no setting of tradecore: did you mean {right}?"


_USUAL = """
PATH HOME USER LOGNAME SHELL PWD OLDPWD LANG LANGUAGE LC_ALL LC_CTYPE TERM TERM_PROGRAM COLORTERM
TMPDIR TEMP TMP TZ HOSTNAME HOSTTYPE EDITOR VISUAL PAGER LESS LS_COLORS SHLVL DISPLAY MAIL
SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK XDG_DATA_DIRS XDG_DATA_HOME XDG_CONFIG_HOME
XDG_RUNTIME_DIR XDG_SESSION_ID DBUS_SESSION_BUS_ADDRESS INVOCATION_ID JOURNAL_STREAM NOTIFY_SOCKET
WATCHDOG_USEC WATCHDOG_PID CREDENTIALS_DIRECTORY STATE_DIRECTORY RUNTIME_DIRECTORY CACHE_DIRECTORY
LOGS_DIRECTORY CONFIGURATION_DIRECTORY LISTEN_FDS MAINPID SYSTEMD_EXEC_PID
HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY FTP_PROXY http_proxy https_proxy no_proxy all_proxy
SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NODE_EXTRA_CA_CERTS PIP_CERT
PIP_INDEX_URL UV_PYTHON PYENV_VERSION PYENV_ROOT VIRTUAL_ENV PYTHONPATH PYTHONUNBUFFERED
PYTHONDONTWRITEBYTECODE PYTHONHASHSEED PYTHON_VERSION PYTHONMALLOC PYTEST_CURRENT_TEST
PYTEST_ADDOPTS CI CI_COMMIT_SHA CI_JOB_ID GITHUB_ACTIONS GITHUB_SHA RUNNER_TEMP
PGHOST PGPORT PGUSER PGPASSWORD PGDATABASE PGDATA PGSSLMODE PGSERVICE PGOPTIONS PGPASSFILE
POSTGRES_USER POSTGRES_PASSWORD POSTGRES_DB POSTGRES_HOST POSTGRES_PORT POSTGRES_URL
DATABASE_URI DATABASE_HOST DATABASE_NAME DATABASE_PORT DATABASE_USER DATABASE_PASSWORD
DATABASE_URL_UNPOOLED DATABASE_PRIVATE_URL TEST_DATABASE_URL SQLALCHEMY_DATABASE_URI DATABASE_POOL
DB_HOST DB_PORT DB_USER DB_PASSWORD DB_NAME DB_URL DB_URI DB_POOL_MIN DB_POOL_MAX DB_MAX_POOL_SIZE
DB_POOL_TIMEOUT DB_SSL REDIS_URI REDIS_HOST REDIS_PORT REDIS_PASSWORD REDIS_TLS_URL REDIS_DB
REDISCLOUD_URL MONGO_URL MONGODB_URI MONGO_URI RABBITMQ_URL AMQP_URL KAFKA_BROKERS SENTRY_DSN
PORT HOST ADDRESS BIND DEBUG VERBOSE ENV ENVIRONMENT NODE_ENV APP_ENV APP_NAME APP_PORT SECRET_KEY
JWT_SECRET API_KEY API_URL BASE_URL WS_URL BATCH SIZE TIMEOUT SYMBOLS SYMBOL EXCHANGE INTERVAL
HTTPS_PORT HTTPS_HOST HTTP_PORTS HTTPS_PORTS ASPNETCORE_HTTP_PORTS HTTP_TIMEOUT HTTP_USER_AGENT
HTTP_REFERER HTTP_COOKIE HTTP_ACCEPT HTTPD_PREFIX SERVER_PORT SERVER_NAME REMOTE_ADDR
LOGLEVEL LOG_DIR LOG_FILE LOG_PATH LOG_COLOR RUST_LOG RUST_LOG_LEVEL DD_LOG_LEVEL TF_LOG_LEVEL
PG_LOG_LEVEL GO_LOG_LEVEL NPM_CONFIG_LOGLEVEL npm_config_loglevel LOG_LEVEL_ROOT UVICORN_LOG_LEVEL
DATADIR DATA_PATH DATA_HOME DATA_ROOT DATA_VOLUME ES_DATA_DIR DD_DATA_DIR GRAFANA_DATA_DIR
MAX_BATCH_SIZE S3_BATCH_SIZE BATCH_SIZE_BYTES TRAIN_BATCH_SIZE RETENTION_DAYS LOG_RETENTION
BINANCE_API_KEY BINANCE_API_SECRET BINANCE_SECRET_KEY BINANCE_TESTNET BINANCE_BASE_URL
BINANCE_TEST_URL BINANCE_TESTNET_URL BINANCE_API_URL BINANCE_WS_URL COINBASE_REST_URL
KUBERNETES_PORT KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT_HTTPS TRADECORE_SERVICE_HOST
TRADECORE_SERVICE_PORT TRADECORE_PORT_3000_TCP_ADDR TRADECORE_DEBUG AWS_REGION AWS_ACCESS_KEY_ID
GOOGLE_APPLICATION_CREDENTIALS DOCKER_HOST COMPOSE_PROJECT_NAME MAKEFLAGS MAKELEVEL MFLAGS CC
CFLAGS LDFLAGS LD_LIBRARY_PATH LD_PRELOAD OMP_NUM_THREADS OPENBLAS_NUM_THREADS MALLOC_ARENA_MAX
ALLOWED_ORIGINS CORS_ALLOWED_ORIGINS CORS_ORIGIN_WHITELIST CORS_ALLOW_ORIGINS RECONNECT
STREAM_URL STREAMLIT_SERVER_PORT UPSTREAMS _ __CFBundleIdentifier
"""
USUAL = _USUAL.split()


@pytest.mark.parametrize("known", [{}, {"DATABASE_URL": "postgresql://h/d", "LOG_LEVEL": "info"}])
def test_other_programs_variables_raise_no_alarm(known: dict[str, str]) -> None:
    assert load(dict.fromkeys(USUAL, "1") | known) == load(known)


def test_a_near_name_beside_the_right_one_belongs_to_another_program() -> None:
    assert load({"CORS_ORIGIN": "*", "CORS_ORIGINS": "https://a.example"}) == Settings(
        cors_origins=("https://a.example",)
    )


def test_addresses_that_a_container_platform_writes_raise_no_alarm() -> None:
    assert load({"TRADECORE_HTTP_PORT": "tcp://10.0.0.7:3000"}) == Settings()


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("wss://stream.binance.com:9443", "wss://stream.binance.com:9443"),
        ("wss://stream.binance.com:9443/", "wss://stream.binance.com:9443"),
        ("wss://stream.binance.com:9443/ws", "wss://stream.binance.com:9443"),
        ("wss://stream.binance.com:9443/ws/", "wss://stream.binance.com:9443"),
        ("wss://stream.binance.com/stream", "wss://stream.binance.com"),
        (" WSS://Stream.Binance.COM/stream/ ", "wss://stream.binance.com"),
        ("ws://127.0.0.1:8080/ws", "ws://127.0.0.1:8080"),
        ("ws://127.8.9.10:1", "ws://127.8.9.10:1"),
        ("ws://[::1]:8080/stream", "ws://[::1]:8080"),
        ("ws://localhost", "ws://localhost"),
    ],
)
def test_websocket_url_is_cut_to_its_base(given: str, base: str) -> None:
    assert load({"BINANCE_WEBSOCKET_URL": given}).websocket_urls == (base,)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("ws://stream.binance.com:9443", "loopback"),
        ("ws://127.0.0.1.example.com", "loopback"),
        ("ws://128.0.0.1", "loopback"),
        ("ws://0.0.0.0", "loopback"),
        ("https://stream.binance.com", "wss://"),
        ("stream.binance.com:9443", "wss://"),
        ("wss://", "wss://"),
        ("wss://host:99999", "wss://host:443"),
        ("wss://h/ws/btcusdt@trade", "without a path"),
        ("wss://h/stream?streams=btcusdt@trade", "query"),
        ("wss://user:hunter2@h/ws", "without user"),
        ("wss://a b", "wss://host"),
        ("wss://h\nx", "control characters"),
    ],
)
def test_websocket_url_refused(given: str, right: str) -> None:
    text = problem(BINANCE_WEBSOCKET_URL=given)
    assert right in text
    assert "hunter2" not in text


@pytest.mark.parametrize("path", ["", "/", "/api", "/api/", "/api/v3", "/api/v3/"])
def test_rest_url_is_cut_to_its_base(path: str) -> None:
    assert load({"BINANCE_REST_URL": f"http://[::1]:80{path}"}).rest_url == "http://[::1]:80"


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.255.0.9", "::1", "localhost", "LOCALHOST")))
    assert not any(
        map(
            is_loopback,
            ("10.0.0.1", "0.0.0.0", "fe80::1%eth0", "::", "localhost.example", "127.1", ""),
        )
    )


@pytest.mark.parametrize(
    ("given", "symbols"),
    [
        ("btcusdt", ("BTCUSDT",)),
        (" btcusdt , ETHusdt ,", ("BTCUSDT", "ETHUSDT")),
        ("BTCUSDT,btcusdt,ETHUSDT,BTCUSDT", ("BTCUSDT", "ETHUSDT")),
        ("币安人生usdt", ("币安人生USDT",)),
        ("straßeusdt,éUSDT", ("STRAßEUSDT", "éUSDT")),
        ("1000SATSUSDT,A-B_C.D", ("1000SATSUSDT", "A-B_C.D")),
        ("A" * 40, ("A" * 40,)),
    ],
)
def test_symbols(given: str, symbols: tuple[str, ...]) -> None:
    assert load({"SUPPORTED_SYMBOLS": given}).symbols == symbols


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (",", "give 1 to"),
        ("BTC USDT", "no symbol"),
        ("BTC/USDT", "no symbol"),
        ("btcusdt@trade", "no symbol"),
        ("A" * 41, "longer than 40 bytes"),
        ("币" * 14, "longer than 40 bytes"),
        ("BTC\x00USDT", "control characters"),
        ("BTC\udcffUSDT", "not UTF-8"),
        ("BTC\u200bUSDT", "control characters"),
        (",".join(f"S{n}" for n in range(4097)), "give 1 to 4096"),
    ],
)
def test_symbols_refused(given: str, right: str) -> None:
    assert right in problem(SUPPORTED_SYMBOLS=given)


@given(st.text(max_size=60))
def test_any_text_gives_a_symbol_that_fits_or_a_sentence(text: str) -> None:
    try:
        symbols = load({"SUPPORTED_SYMBOLS": text}).symbols
    except SettingsError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("SUPPORTED_SYMBOLS is ")
    else:
        for symbol in symbols:
            assert 1 <= len(symbol.encode()) <= 40
            assert not any("a" <= character <= "z" for character in symbol)


@given(st.sampled_from(sorted(VARIABLES)), st.text(max_size=40))
@example("settings_file", "0\n0")
def test_no_text_breaks_a_parser(field: str, text: str) -> None:
    try:
        load({VARIABLES[field].name: text})
    except SettingsError as error:
        assert all("\n" not in line for line in error.problems)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("24h", 86400),
        ("24 hours", 86400),
        ("7 days", 7 * 86400),
        ("1 Day", 86400),
        ("90m", 5400),
        ("90 min", 5400),
        ("3600s", 3600),
        ("2 weeks", 14 * 86400),
        ("1 month", 30 * 86400),
        ("2 years", 2 * 365 * 86400),
        ("off", 0),
    ],
)
def test_durations(given: str, seconds: int) -> None:
    assert load({"BACKFILL_MAX_AGE": given}).backfill_max_age_s == seconds


@pytest.mark.parametrize(
    "given", ["24", "h", "-1h", "1.5h", "1 fortnight", "30s", "11 years", "٣h"]
)
def test_durations_refused(given: str) -> None:
    assert "from 1 minute to 10 years, such as 24h, or off" in problem(BACKFILL_MAX_AGE=given)


@pytest.mark.parametrize("given", ["24h", "1 day", "1381m"])
def test_connections_are_replaced_well_before_the_venue_cuts_them(given: str) -> None:
    assert "from 5 seconds to 23 hours" in problem(CONNECTION_MAX_AGE=given)
    assert load({"CONNECTION_MAX_AGE": "23h"}).connection_max_age_s == 23 * 3600


def test_retention_off() -> None:
    settings = load({"RETENTION": "off", "COMPRESS_AFTER": "OFF"})
    assert settings.retention_s is None
    assert settings.compress_after_s is None


@pytest.mark.parametrize(
    ("given", "rows"), [("1024", 1024), ("1Ki", 1024), ("4 mi", 1 << 22), ("134217728", 1 << 27)]
)
def test_ring_capacity(given: str, rows: int) -> None:
    assert load({"RING_CAPACITY": given}).ring_capacity == rows


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("1000000", "the next one is 1048576"),
        ("3Mi", "the next one is 4194304"),
        ("512", "the next one is 1024"),
        ("0", "the next one is 1024"),
        ("268435456", "the next one is 134217728"),
        ("1M", "power of two"),
        ("-1", "power of two"),
    ],
)
def test_ring_capacity_refused(given: str, right: str) -> None:
    assert right in problem(RING_CAPACITY=given)


@pytest.mark.parametrize("given", ["", "0x10", "1_000", "٣", "9" * 5000, "1.0", "+5"])
def test_numbers_are_plain_digits(given: str) -> None:
    if given:
        assert "whole number from 1 to 1000000" in problem(BATCH_SIZE=given)
        assert len(problem(BATCH_SIZE=given)) < 200


def test_other_values() -> None:
    settings = load(
        {
            "LOG_LEVEL": "WARN",
            "LOG_FORMAT": "Text",
            "AUTO_MIGRATE": "False",
            "STREAMS": "Trade, trade,",
            "HTTP_HOST": "[::1]",
            "HTTP_PORT": "0",
            "CORS_ORIGINS": "https://A.example, http://localhost:8080,https://a.example",
            "DATA_DIR": "~/tc data",
        }
    )
    assert settings.log_level == "warning"
    assert settings.log_format == "text"
    assert settings.auto_migrate is False
    assert settings.streams == ("trade",)
    assert settings.http_host == "::1"
    assert settings.http_port == 0
    assert settings.cors_origins == ("https://a.example", "http://localhost:8080")
    assert settings.data_dir == Path.home() / "tc data"


@pytest.mark.parametrize(
    "text", ["x" * 15, "x" * 513, "x" * 20 + " y", "пароль-из-букв-и-слов", "x" * 20 + "\x7f"]
)
def test_a_token_fits_into_a_header_and_cannot_be_guessed(text: str) -> None:
    found = problem(HTTP_TOKEN=text)
    assert found.startswith("HTTP_TOKEN has a wrong value: ")
    assert text not in found


def test_token_and_names_of_the_side_server(tmp_path: Path) -> None:
    (tmp_path / "http_token").write_text("hunter2-hunter2-hunter2\n")
    settings = load(
        {
            "CREDENTIALS_DIRECTORY": str(tmp_path),
            "HTTP_HOSTS": "Capture.example., tradecore,capture.example",
        }
    )
    assert settings.http_token == Secret("hunter2-hunter2-hunter2")
    assert "hunter2" not in repr(settings)
    assert settings.http_hosts == ("capture.example", "tradecore")
    for name in ("a.example:80", "https://a.example", "-a", "a..b", "a/b"):
        assert "is no name of a host" in problem(HTTP_HOSTS=name)
    (found,) = problems(HTTP_AUTH="off", HTTP_TOKEN="x" * 16)
    assert found == "HTTP_AUTH is off and HTTP_TOKEN is set: take one of them out"


def test_contradictions() -> None:
    found = problems(
        RECONNECT_DELAY="2000", MAX_RECONNECT_DELAY="1000", RETENTION="7d", COMPRESS_AFTER="1 week"
    )
    assert found == [
        "MAX_RECONNECT_DELAY is 1000: give at least RECONNECT_DELAY, which is 2000",
        "COMPRESS_AFTER is 7 days: give less than RETENTION, or off",
    ]


# -- secrets --------------------------------------------------------------------------------------

DSN = "postgresql://u:hunter2@db/t"


def test_secret_shows_itself_only_when_asked() -> None:
    settings = load({"DATABASE_URL": DSN, "REDIS_URL": "redis://:hunter2@h:6379/0"})
    assert settings.database_url is not None
    assert settings.database_url.reveal() == DSN
    assert "hunter2" not in f"{settings} {settings!r} {settings.database_url} {Secret('hunter2')!r}"
    assert Secret("a") == Secret("a") != Secret("b")
    assert len({Secret("a"), Secret("a")}) == 1


def test_secret_from_file(tmp_path: Path) -> None:
    file = tmp_path / "dsn"
    file.write_text(f"{DSN}\n")
    assert load({"DATABASE_URL_FILE": str(file)}).database_url == Secret(DSN)
    assert "keep one" in problem(DATABASE_URL_FILE=str(file), DATABASE_URL=DSN)


@pytest.mark.parametrize("name", ["DATABASE_URL", "database_url", "tradecore_database_url"])
def test_secret_from_systemd_credential(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(DSN)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load(environ).database_url == Secret(DSN)
    other = environ | {"DATABASE_URL": "postgresql://other/t"}
    assert load(other).database_url == Secret("postgresql://other/t")
    assert load({"CREDENTIALS_DIRECTORY": str(tmp_path / "none")}).database_url is None


def test_secret_files_refused(tmp_path: Path) -> None:
    assert "No such file" in problem(DATABASE_URL_FILE=str(tmp_path / "none"))
    assert "Is a directory" in problem(DATABASE_URL_FILE=str(tmp_path))
    bad = tmp_path / "bad"
    for content, right in (
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xff\xfe", "UTF-8"),
        (b"postgresql://" + b"x" * 70000, "too long"),
        (b"hunter2", "starts with postgresql://"),
        (b"postgresql://u:hunter2@h/d\nsecond line", "control characters"),
    ):
        bad.write_bytes(content)
        text = problem(DATABASE_URL_FILE=str(bad))
        assert right in text
        assert "hunter2" not in text


# -- the rest -------------------------------------------------------------------------------------


def test_http_address_reads_nothing_else() -> None:
    assert http_address({"HTTP_PORT": "81", "BATCH_SIZE": "nonsense"}) == ("127.0.0.1", 81)
    with pytest.raises(SettingsError, match="HTTP_PORT is 'x'"):
        http_address({"HTTP_PORT": "x"})


def test_the_health_probe_needs_no_numpy() -> None:
    code = "import sys; from tradecore.settings import http_address as a; a({}); "
    code += "sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_describe_names_every_variable_with_its_default() -> None:
    text = describe()
    for variable in VARIABLES.values():
        assert f"  {variable.name} " in text
        assert f"[{variable.default or 'unset'}]" in text
