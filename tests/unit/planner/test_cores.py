"""Work on all cores ends as one process would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_an_interrupt_ends_other_processes_quietly(tmp_path):
    """Ctrl-C reaches every process of the terminal: while candidates are priced, only one may speak."""
    script = tmp_path / "pieces.py"
    script.write_text(
        "import sys, time\nfrom planner.cores import on_all_cores\n"
        "def piece():\n    print('begun', flush=True)\n    time.sleep(60)\n"
        "try:\n    on_all_cores([piece, piece])\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(min(2, len(os.sched_getaffinity(0)))):
        process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
