"""tradecore: an exact, gap-proof recorder of Binance Spot market data."""

import os

# OpenBLAS, which comes with numpy, would start threads that spin for a while, and tradecore
# multiplies no matrices. It looks when numpy is imported first.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
