"""Whether Redis takes what is published there."""

from collections.abc import AsyncIterator

from tradecore.checks.finding import Finding
from tradecore.values import Secret


async def check_redis(url: Secret) -> AsyncIterator[Finding]:
    """Do what the daemon does; nothing here keeps a capture from running, so nothing fails."""
    from tradecore.redis import scripts
    from tradecore.redis.address import parse
    from tradecore.redis.wire import RedisError, Wire, command

    address = parse(url.reveal())
    try:
        wire = await Wire.open(address)
        try:
            probe = f"{scripts.STATUS}check"
            await wire.call(
                [
                    command("SET", probe, "1", "EX", 1),
                    command("EVAL", scripts.PUT, 2, scripts.LAST, scripts.LAST),
                    command("DEL", probe),
                ]
            )
        finally:
            wire.close()
    except RedisError as error:
        text = f"{address} takes no values: {error}"
        yield Finding("warn", "redis", text, "capture runs without it")
        return
    yield Finding("ok", "redis", f"{address} takes values")
    if address.in_the_clear:
        text = f"{address}: password and values travel in the clear"
        yield Finding("warn", "redis", text, "use rediss:// or a unix socket")
