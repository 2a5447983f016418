from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from runtime.host_memory import NVIDIA

SIZE, TIMES = 36 << 20, 5
PROGRAM = f"""
import resource, sys, threading
if "keep" in sys.argv:
    from runtime.host_memory import keep_freed_memory
    keep_freed_memory()

def work():
    for _ in range({TIMES}):
        bytearray({SIZE})

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for run in (work, lambda: [t := threading.Thread(target=work), t.start(), t.join()]):
    run()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or NVIDIA.exists(), reason="another C library, or GPUs")
def test_freed_memory_is_paid_for_once_whichever_thread_takes_it() -> None:
    def paid(*arguments: str) -> int:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert paid() > 2 * TIMES * SIZE * 0.9
    assert paid("keep") < 2 * SIZE
