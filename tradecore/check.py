"""`tradecore check`: tests everything that a capture needs and says how to mend what is wrong."""

from collections.abc import AsyncIterator

from tradecore import log, output
from tradecore.checks.cache import check_redis
from tradecore.checks.database import check_database
from tradecore.checks.finding import Finding
from tradecore.checks.host import check_host
from tradecore.checks.venue import check_venue
from tradecore.errors import EXIT_OK, SettingsError
from tradecore.settings import Settings


def refuse(error: SettingsError) -> int:
    """Report wrong settings; nothing else can be tested with them."""
    for problem in error.problems:
        _print(Finding("fail", "settings", problem))
    return error.exit_code


async def run(settings: Settings) -> int:
    """Test everything, print a line each, return the exit code of the first failure or 0."""
    exit_code = EXIT_OK
    async for finding in find(settings):
        _print(finding)
        exit_code = exit_code or finding.exit_code
    return exit_code


def _print(finding: Finding) -> None:
    text = f"{finding.grade:<5} {finding.what:<9} {log.mask(finding.text)}"
    try:
        print(text + (f": {finding.mend}" if finding.mend else ""), flush=True)
    except BrokenPipeError:
        output.forsake()  # the test ends as if it were read: what it has open is closed


async def find(settings: Settings) -> AsyncIterator[Finding]:
    """Yield the findings, from the nearest (settings) to the farthest (the venue)."""
    text = f"symbols: {len(settings.symbols)}, streams of each: {', '.join(settings.streams)}"
    yield Finding("ok", "settings", text)
    for finding in check_host(settings):
        yield finding
    async for finding in check_database(settings):
        yield finding
    if settings.redis_url is not None:
        async for finding in check_redis(settings.redis_url):
            yield finding
    async for finding in check_venue(settings):
        yield finding
