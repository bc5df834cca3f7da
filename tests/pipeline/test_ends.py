"""The end of real processes, with a real interpreter that ends: no word, no thread and no file too many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import free_port
from versions import newer_torch

HERE = Path(__file__).parent


@newer_torch  # the older leaves a temporary folder, and a word about it
@pytest.mark.slow
def test_processes_end_as_they_should():
    codes = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", HERE / "ends.py", str(free_port())],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.PIPE,
        text=True,
        timeout=180,
        check=True,
    ).stdout
    above, below = (Path(f"stderr-{rank}").read_text() for rank in range(2))
    assert codes.split() == ["1", "1"], above + below
    assert below.count("Traceback") == 1
    assert below.strip().endswith("ValueError: nan in layer 7")
    assert above.count("StageError: Stage 0 (rank 1, host ") == 1
    assert "failed in step 10: ValueError: nan in layer 7. Every stage stops" in above
    for said in (above, below):
        assert "terminate" not in said
        assert "Exception ignored" not in said
