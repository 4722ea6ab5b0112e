"""What a simulated symbol looks like: its assets, its decimals, how large its trades are.

Tick and step are chosen so that price x quantity never has more than eight decimals, as with the
venue's own symbols; so the quote volumes of candles are exact sums, without any rounding rule.
"""

from dataclasses import dataclass
from hashlib import blake2b

DEFAULT_SYMBOLS = (
    "BTCUSDT", "ETHUSDT", "SOLUSDT", "PEPEUSDT", "LUNCUSDT", "BTTCUSDT", "BTCIDRT",
    "币安人生USDT", "QUIETUSDT",
)  # fmt: skip
"""Listed unless told otherwise; every kind of profile is among them."""
QUOTE_ASSETS = (
    "USDT", "FDUSD", "USDC", "TUSD", "BUSD", "IDRT", "BIDR", "BTC", "ETH", "BNB", "EUR", "TRY",
)  # fmt: skip
_TWO_DECIMALS = {"PEPE", "SHIB", "BONK", "FLOKI", "1000SATS", "BOME", "NOT", "DOGS", "XEC"}
_HUGE = {"LUNC", "WIN", "DENT", "HOT"}
_LARGEST_E8 = 2**63 - 1
_KNOWN_PRICES = {"BTC": 61_837_63, "ETH": 2_683_14}  # in cents
_CLASSES = (  # tick decimals, step decimals, middle price in ticks, largest ordinary size in steps
    (2, 5, 45_000_00, 300_000),
    (2, 3, 180_00, 500_000),
    (4, 2, 6_1234, 2_000_000),
    (5, 1, 43_210, 5_000_000),
    (8, 0, 3_214, 9_000_000),
)


@dataclass(frozen=True)
class Profile:
    """The fixed properties of a symbol; prices count in ticks, quantities in steps."""

    symbol: str
    base_asset: str
    quote_asset: str
    base_precision: int
    """Decimals printed for quantities and base volumes."""
    quote_precision: int
    """Decimals printed for prices and quote volumes."""
    tick_decimals: int
    step_decimals: int
    middle_ticks: int
    """The price that the walk swings around."""
    largest_steps: int
    """Largest ordinary quantity."""
    extreme_steps: int
    """A rare quantity at the venue's own limit, 0 = none."""


def hash64(*words: object) -> int:
    """Return 64 well mixed bits for the words; the same on every machine and Python."""
    text = "\x00".join(map(str, words)).encode("utf-8")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def is_quiet(symbol: str) -> bool:
    """Tell whether the symbol trades only once in minutes, whatever the rate."""
    return symbol.startswith("QUIET")


def profile_of(symbol: str) -> Profile:
    """Return the profile of any symbol; it depends on nothing but the name."""
    quote = next((q for q in QUOTE_ASSETS if symbol.endswith(q) and symbol != q), "USDT")
    base = symbol.removesuffix(quote) or symbol
    if base in _TWO_DECIMALS:
        return Profile(symbol, base, quote, 2, 8, 8, 0, 1_234, 2**31 - 1, _LARGEST_E8 // 10**8)
    if base == "BTTC":
        return Profile(symbol, base, quote, 1, 8, 8, 0, 61, 2**31 - 1, 0)
    if quote in ("IDRT", "BIDR"):
        return Profile(symbol, base, quote, 8, 2, 0, 2, 9_000_000_000, 9_000, 0)
    if base in _HUGE:
        return Profile(symbol, base, quote, 8, 8, 0, 8, 3, 2**31 - 1, _LARGEST_E8)
    if base in _KNOWN_PRICES and quote in ("USDT", "FDUSD", "USDC"):
        return Profile(symbol, base, quote, 8, 8, 2, 5, _KNOWN_PRICES[base], 300_000, 0)
    tick, step, middle, largest = _CLASSES[hash64("profile", symbol) % len(_CLASSES)]
    return Profile(symbol, base, quote, 8, 8, tick, step, middle, largest, 0)
