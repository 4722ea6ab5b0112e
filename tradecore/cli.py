"""The command line. What a command needs is imported when it is called: each starts fast."""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NoReturn

from tradecore import __version__, errors, journal, log, output
from tradecore.errors import SettingsError, TradecoreError
from tradecore.settings import Settings, describe, load

_EXIT_CODES = f"""exit codes:
  {errors.EXIT_OK}    done, or stopped by SIGTERM after everything was drained
  {errors.EXIT_BUG}    a bug in tradecore; for `health`: not ready, not live
  {errors.EXIT_USAGE}    a wrong command line or setting
  {errors.EXIT_DATABASE}    the database cannot be used: DSN, rights, schema version
  {errors.EXIT_DATA_DIR}    DATA_DIR cannot be used: another daemon has it, no room, damage
  {errors.EXIT_DIFFERENCE}    `verify` finds a difference, `backfill` leaves a hole, `import` fails
  {errors.EXIT_VENUE}    the venue cannot be reached or refuses us
  130  stopped by SIGINT, 143 by SIGTERM (short commands)
"""
_SETTINGS = """settings are environment variables, an empty one counts as unset:
{settings}

passwords: DATABASE_URL and REDIS_URL may also lie in a file named by DATABASE_URL_FILE and
REDIS_URL_FILE, or be systemd credentials of these names.

"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors suggest what was meant and end in one sentence."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **arguments,
        )

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.format_usage()}tradecore: {message}\n")
        sys.exit(errors.EXIT_USAGE)

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End with the first of the words that nobody knows."""
        word = words[0].partition("=")[0]
        kind = "option" if word.startswith("-") else "argument"
        self.error(f"unknown {kind} {word}{_suggest(word, self._option_string_actions)}")


def _suggest(word: str, known: Any) -> str:
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        return int(options.act(options))
    except SettingsError as error:
        return _fail(error.problems, error.exit_code)
    except TradecoreError as error:
        return _fail([str(error)], error.exit_code)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        output.forsake()
        return 128 + signal.SIGPIPE
    except Exception:  # noqa: BLE001 - the last place that can tell
        sentence = f"this is a bug in tradecore, please report it:\n{traceback.format_exc()}"
        return _fail([sentence], errors.EXIT_BUG)
    finally:
        log.stop()


def _fail(sentences: Sequence[str], exit_code: int) -> int:
    log.stop()  # what led to it comes first
    with suppress(OSError):
        for sentence in sentences:
            line = f"tradecore: {log.mask(sentence)}\n"
            if journal.is_journal(sys.stderr):
                line = journal.with_priority(line.encode(errors="replace"), logging.ERROR).decode()
            sys.stderr.write(line)
    return exit_code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="tradecore",
        description="Records Binance Spot market data into PostgreSQL, exactly and without gaps.",
        epilog=f"`tradecore run --help` lists the settings.\n\n{_EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"tradecore {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(name: str, act: Callable[[argparse.Namespace], int], text: str) -> _Parser:
        command = commands.add_parser(name, help=text, description=text, epilog=_EXIT_CODES)
        command.set_defaults(act=act)
        return command

    add("run", _run, "capture until SIGTERM").epilog = (
        _SETTINGS.format(settings=describe()) + _EXIT_CODES
    )
    add("check", _check, "test settings, folder, database, venue and clock")
    migrate = add("migrate", _migrate, "bring the schema up to date")
    either = migrate.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="only say what is pending")
    either.add_argument(
        "--raise-level",
        action="store_true",
        help="also make the tables what the server can do by now: hypertables, aggregates",
    )
    verify = add("verify", _verify, "recount the trades against the ledger")
    verify.add_argument("--symbol", help="only this one", metavar="SYMBOL")
    backfill = add("backfill", _backfill, "fill holes from the venue, and history before the first")
    backfill.add_argument(
        "--symbol", action="append", default=[], help="only this one; may be repeated"
    )
    backfill.add_argument(
        "--from",
        dest="from_text",
        metavar="TIME",
        help="from here on, also before the first stored trade; a date or time (UTC), or 3d ago",
    )
    backfill.add_argument(
        "--to",
        dest="to_text",
        metavar="TIME",
        help="only holes from before this; history is not bounded by it",
    )
    backfill.add_argument(
        "--source",
        choices=("auto", "rest", "dump"),
        default="auto",
        help="the venue's REST, its daily dumps, or both (default): the dumps for what REST no"
        " longer has and for long days",
    )
    import_ = add("import", _import, "store the venue's dump files of trades")
    import_.add_argument("paths", nargs="+", metavar="PATH", help="files, or folders with them")
    import_.add_argument("--symbol", help="of files whose names do not tell it")
    simulate = add("simulate", _simulate, "run a local exchange that speaks the venue's protocol")
    health = add("health", _health, "ask the running daemon whether it is ready (0) or not (1)")
    health.add_argument(
        "--live",
        action="store_true",
        help="whether it answers at all, whatever venue and database do: kill what does not",
    )

    word = next((word for word in arguments if not word.startswith("-")), None)
    if word is not None and word not in commands.choices:
        parser.error(f"unknown command {word}{_suggest(word, commands.choices)}")
    if word == "simulate":
        from tradecore.simulate.command import add_arguments

        add_arguments(simulate)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        (commands.choices[word] if word else parser).refuse(unknown)
    if options.command is None:
        parser.print_help(sys.stderr)
        sys.exit(errors.EXIT_USAGE)
    return options


def _settings(*, quiet: bool = False) -> Settings:
    """Read the settings and start the log; `quiet` commands log as text, and warnings only."""
    settings = load(os.environ)
    level, form = settings.log_level, settings.log_format
    if quiet:
        level, form = ("warning" if level == "info" else level), "text"
    log.start(level, form, secrets=filter(None, (settings.database_url, settings.redis_url)))
    return settings


def _run(_: argparse.Namespace) -> int:
    import uvloop

    from tradecore.tls import no_authorities

    with no_authorities():
        from tradecore import supervisor

    return uvloop.run(supervisor.run(_settings()))


def _check(_: argparse.Namespace) -> int:
    from tradecore import check

    try:
        settings = _settings(quiet=True)
    except SettingsError as error:
        return check.refuse(error)
    return _until_signal(check.run(settings))


def _migrate(options: argparse.Namespace) -> int:
    from tradecore import commands

    return _until_signal(
        commands.migrate(
            _settings(quiet=True), only_check=options.check, raise_level=options.raise_level
        )
    )


def _verify(options: argparse.Namespace) -> int:
    from tradecore import commands

    return _until_signal(commands.verify(_settings(quiet=True), symbol=options.symbol))


def _backfill(options: argparse.Namespace) -> int:
    from tradecore import commands_backfill

    return _until_signal(
        commands_backfill.run(
            _settings(quiet=True),
            symbols=options.symbol,
            from_text=options.from_text,
            to_text=options.to_text,
            source=options.source,
        )
    )


def _import(options: argparse.Namespace) -> int:
    from tradecore import commands_import

    return _until_signal(
        commands_import.run(_settings(quiet=True), options.paths, symbol=options.symbol)
    )


def _simulate(options: argparse.Namespace) -> int:
    import uvloop

    from tradecore.simulate.command import run

    return uvloop.run(run(options))


def _health(options: argparse.Namespace) -> int:
    from tradecore import commands

    return commands.health(os.environ, live=options.live)


def _until_signal(work: Coroutine[Any, Any, int]) -> int:
    """Run `work`; SIGINT and SIGTERM cancel it, so that what it has opened is closed."""
    import asyncio

    import uvloop

    received: list[int] = []

    async def guarded() -> int:
        task = asyncio.current_task()
        assert task is not None

        def cancel(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, cancel, number)
        try:
            return await work
        except asyncio.CancelledError:
            if not received:
                raise
            return 128 + received[0]

    return uvloop.run(guarded())
