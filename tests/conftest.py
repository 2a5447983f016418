"""Settings of the whole test suite.

`tests` and its folders are packages, so pytest puts the repository's root on the path and
`from tests.ranks.launch import run_ranks` works from any test.
"""

from __future__ import annotations

import os

from hypothesis import settings

# One thread per process: ranks share the cores, and a forked child must not inherit an OpenMP pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")
