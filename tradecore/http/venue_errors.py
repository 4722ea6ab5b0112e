"""The venue's refusals: code, words and HTTP status as in its page "Error codes" (errors.md).

{"code": -1121, "msg": "Invalid symbol."} with status 400, unless said otherwise.
"""

NUMBER = "^[0-9]{1,20}$"
SYMBOL = "^[\\w\\-._&&[^a-z]]{1,50}$"
SYMBOLS = f'^\\[("{SYMBOL[1:-1]}"(,"{SYMBOL[1:-1]}"){{0,}}){{0,1}}\\]$'


class RefusedError(Exception):
    """An answer with the venue's error body; `retry_after_s` becomes a header."""

    def __init__(
        self, code: int, message: str, status: int = 400, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.retry_after_s = retry_after_s


def disconnected() -> RefusedError:
    """The database is away."""
    text = "Internal error; unable to process your request. Please try again."
    return RefusedError(-1001, text, 503, 1)


def too_many_requests(limit: int, retry_after_s: int) -> RefusedError:
    """More weight in a minute than allowed."""
    text = (
        f"Too much request weight used; current limit is {limit} request weight per 1 MINUTE."
        " Please use WebSocket Streams for live updates to avoid polling the API."
    )
    return RefusedError(-1003, text, 429, retry_after_s)


def timed_out() -> RefusedError:
    """The database took too long."""
    text = (
        "Timeout waiting for response from backend server."
        " Send status unknown; execution status unknown."
    )
    return RefusedError(-1007, text, 503, 1)


def overloaded() -> RefusedError:
    """Too many requests wait for the database."""
    text = "Server is currently overloaded with other requests. Please try again in a few minutes."
    return RefusedError(-1008, text, 503, 1)


def unsupported(why: str, status: int = 400) -> RefusedError:
    """What tradecore does not have; `why` is a sentence."""
    return RefusedError(-1020, f"This operation is not supported. {why}", status)


def illegal(name: str, legal: str) -> RefusedError:
    """Characters that a parameter must not have; `legal` is what it may have."""
    text = f"Illegal characters found in parameter '{name}'; legal range is '{legal}'."
    return RefusedError(-1100, text)


def repeated() -> RefusedError:
    """A parameter that was sent twice."""
    return RefusedError(-1101, "Duplicate values for a parameter detected.")


def too_many_parameters(expected: int, received: int) -> RefusedError:
    """More parameters than the endpoint has."""
    text = f"Too many parameters; expected '{expected}' and received '{received}'."
    return RefusedError(-1101, text)


def missing(name: str) -> RefusedError:
    """A mandatory parameter that was not sent, or one that is of no use."""
    text = f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed."
    return RefusedError(-1102, text)


def missing_both(one: str, other: str) -> RefusedError:
    """One of two parameters has to be sent."""
    text = f"Param '{one}' or '{other}' must be sent, but both were empty/null!"
    return RefusedError(-1102, text)


def unread(read: int, sent: int) -> RefusedError:
    """A parameter that the endpoint does not have."""
    text = f"Not all sent parameters were read; read '{read}' parameter(s) but was sent '{sent}'."
    return RefusedError(-1104, text)


def empty(name: str) -> RefusedError:
    """A parameter without a value."""
    return RefusedError(-1105, f"Parameter '{name}' was empty.")


def bad_interval() -> RefusedError:
    """An interval that is unknown."""
    return RefusedError(-1120, "Invalid interval.")


def bad_symbol() -> RefusedError:
    """A symbol that is neither captured nor stored."""
    return RefusedError(-1121, "Invalid symbol.")


def bad_status() -> RefusedError:
    """A symbolStatus that is none."""
    return RefusedError(-1122, "Invalid symbolStatus.")


def bad_combination() -> RefusedError:
    """Parameters that exclude each other, or a range that ends before it begins."""
    return RefusedError(-1128, "Combination of optional parameters invalid.")


def bad_data(name: str) -> RefusedError:
    """A value that is well spelt and means nothing."""
    return RefusedError(-1130, f"Data sent for parameter '{name}' is not valid.")


def bad_ticker_type() -> RefusedError:
    """A type of ticker that is neither FULL nor MINI."""
    return RefusedError(-1139, "Invalid ticker type.")


def repeated_symbols() -> RefusedError:
    """A list that names a symbol twice."""
    return RefusedError(-1151, "Symbol is present multiple times in the list.")


def no_sbe() -> RefusedError:
    """The binary encoding was asked for."""
    return RefusedError(-1155, "SBE is not enabled.")


def bad_time_unit() -> RefusedError:
    """X-MBX-TIME-UNIT with another value."""
    text = "Invalid value for time unit; expected either MICROSECOND or MILLISECOND."
    return RefusedError(-1194, text)


def other_status() -> RefusedError:
    """The symbol is there and not in the state that was asked for."""
    text = "The symbol's status does not match the requested symbolStatus."
    return RefusedError(-1220, text)


def no_window() -> RefusedError:
    """No trade of the symbol is in the window."""
    text = "No trading window could be found for the symbol. Try ticker/24hrs instead."
    return RefusedError(-2016, text)
