"""Benchmarks of the ORPO loss: every peer, two logit distributions, time and memory.

`workloads.py` makes the inputs, `implementations.py` and `peers.py` hold one adapter each with one
signature, `truth.py` refuses to time a wrong result, `measure.py` times, `memory.py` weighs,
`run.py` writes the JSON and `report.py` the tables and the pictures.
"""

import time

BEGUN = time.perf_counter()
"""When this process began with it: what it imports after this counts as time of a benchmark."""
