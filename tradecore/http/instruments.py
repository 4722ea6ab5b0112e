"""What `exchangeInfo` tells of a symbol: only what a recorder can know, in the venue's shape.

The venue's page "Exchange information". Known are the name, that it is captured, and that prices
and quantities are kept with 8 decimals. Base and quote are told apart by the quote assets that the
venue lists. The real steps and limits of orders are not known: the filters give what the tables can
hold, and rules that would bind an order (MIN_NOTIONAL and others) are left out.
"""

from functools import lru_cache
from typing import Any

import orjson

QUOTES = (
    *("FDUSD", "USDT", "USDC", "TUSD", "BUSD", "USDP", "USDE", "USD1", "XUSD", "BFUSD", "RLUSD"),
    *("AEUR", "EURI", "IDRT", "BIDR", "BKRW", "BVND", "VAI", "PAX", "USDS", "UST", "DAI"),
    *("TRY", "EUR", "BRL", "JPY", "ARS", "COP", "CZK", "GBP", "AUD", "MXN", "PLN", "RON", "RUB"),
    *("UAH", "ZAR", "NGN", "IDR", "KZT", "USD"),
    *("BTC", "ETH", "BNB", "XRP", "TRX", "DOT", "SOL", "DOGE"),
)
"""Quote assets of the venue's symbols, past and present."""

_LARGEST = "9000000000.00000000"
_SMALLEST = "0.00000001"
_ORDER_TYPES = (
    *("LIMIT", "LIMIT_MAKER", "MARKET", "STOP_LOSS", "STOP_LOSS_LIMIT"),
    *("TAKE_PROFIT", "TAKE_PROFIT_LIMIT"),
)


def assets(symbol: str) -> tuple[str, str]:
    """Return base and quote asset; no quote where none of QUOTES fits."""
    quotes = [q for q in QUOTES if symbol.endswith(q) and symbol != q]
    quote = max(quotes, key=len, default="")
    return symbol[: len(symbol) - len(quote)], quote


def instrument(symbol: str, permission_sets: bool = True) -> dict[str, Any]:
    """Return the entry of a symbol."""
    base, quote = assets(symbol)
    return {
        "symbol": symbol,
        "status": "TRADING",
        "baseAsset": base,
        "baseAssetPrecision": 8,
        "quoteAsset": quote,
        "quotePrecision": 8,
        "quoteAssetPrecision": 8,
        "baseCommissionPrecision": 8,
        "quoteCommissionPrecision": 8,
        "orderTypes": _ORDER_TYPES,
        "icebergAllowed": False,
        "ocoAllowed": False,
        "otoAllowed": False,
        "opoAllowed": False,
        "quoteOrderQtyMarketAllowed": False,
        "allowTrailingStop": False,
        "cancelReplaceAllowed": False,
        "amendAllowed": False,
        "pegInstructionsAllowed": False,
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "filters": [
            {
                "filterType": "PRICE_FILTER",
                "minPrice": _SMALLEST,
                "maxPrice": _LARGEST,
                "tickSize": _SMALLEST,
            },
            {
                "filterType": "LOT_SIZE",
                "minQty": _SMALLEST,
                "maxQty": _LARGEST,
                "stepSize": _SMALLEST,
            },
        ],
        "permissions": [],
        "permissionSets": [["SPOT"]] if permission_sets else [],
        "defaultSelfTradePreventionMode": "NONE",
        "allowedSelfTradePreventionModes": ["NONE"],
    }


@lru_cache(maxsize=4096)
def instrument_json(symbol: str, permission_sets: bool = True) -> bytes:
    """Return the entry of a symbol as JSON."""
    return orjson.dumps(instrument(symbol, permission_sets))


def rate_limits(weight: int) -> list[dict[str, Any]]:
    """Return the limits that hold here."""
    return [
        {
            "rateLimitType": "REQUEST_WEIGHT",
            "interval": "MINUTE",
            "intervalNum": 1,
            "limit": weight,
        }
    ]
