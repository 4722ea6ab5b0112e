"""Torture: the real daemon, the simulated exchange and a real PostgreSQL, broken at random.

`python -m tests.torture --rounds 100 --seed 1`, or `make torture`. What happens in a round follows
from seed and number of the round, except for the machine's own timing.
"""
