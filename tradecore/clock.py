"""The only Python module that reads clocks; tests replace these two names."""

from time import monotonic_ns, time_ns

wall_ns = time_ns
"""Nanoseconds since 1970-01-01 UTC by the host clock (may step)."""

mono_ns = monotonic_ns
"""Nanoseconds since an arbitrary start (never steps); use it for every duration."""
