"""The end of real processes, with a real interpreter that ends: no word, no thread and no file too many."""

import os
import subprocess
import sys
from pathlib import Path

from processes import free_port

HERE = Path(__file__).parent


def test_processes_end_as_they_should():
    port = free_port()
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", HERE / "ends.py", str(rank), str(port)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        above, below = (process.communicate(timeout=120)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [1, 1], above + below
    assert below.count("Traceback") == 1
    assert below.strip().endswith("ValueError: nan in layer 7")
    cause = "StageError: Stage 0 (rank 1, host "
    assert above.count(cause) == 1
    assert "failed in step 10: ValueError: nan in layer 7. Every stage stops" in above
    for said in (above, below):
        assert "terminate" not in said
        assert "Exception ignored" not in said
