"""The small kernels without a GPU, interpreted and compiled, each in a process of its own.

TRITON_INTERPRET is read where triton decorates its functions, so one process either interprets or compiles, whichever
test imports triton first; here it is neither.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("file", "variables"),
    [("kernels_small_cases.py", {"TRITON_INTERPRET": "1"}), ("kernels_small_compiled.py", {})],
)
def test_the_kernels_in_a_process_of_their_own(file, variables):
    """Catches what the file's own tests catch; its report is in the message."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST") and k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)]
    run = subprocess.run(
        command, cwd=HERE.parent, env=inherited | variables, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
