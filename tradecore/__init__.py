"""tradecore: an exact, gap-proof recorder of Binance Spot market data."""

__version__ = "0.1.0"
