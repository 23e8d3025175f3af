"""Runs the interpreted tests in processes of their own: one cannot interpret and compile.

To run them by hand, or one of them:
    TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest -p tests.kernels.interpreted.plugin \
        -o 'python_files=check_*.py' tests/kernels/interpreted
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "interpreted").glob("check_*.py"))
# Of the longest, several processes: pytest's workers have parts of like length to take.
PARTS = {"check_scan": 2, "check_sparse_loss": 3, "check_sparse_selftest": 2}
CASES = [
    pytest.param(path, f"{part}/{count}", id=f"{path.stem.removeprefix('check_')}-{part}")
    for path in FILES
    for count in (PARTS.get(path.stem, 1),)
    for part in range(1, count + 1)
]


def test_the_parts_are_of_files_there_are():
    assert {path.stem for path in FILES} >= set(PARTS)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "part"), CASES)
def test_interpreted(path, part):
    # numpy's and torch's threads fight over small blocks: one each.
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-p", "tests.kernels.interpreted.plugin",
        "-p", "no:cacheprovider", "-o", "python_files=check_*.py", "--tb=short", "-W", "error",
        "--part", part,
        "-W", "ignore:overflow encountered in exp:RuntimeWarning",  # of lanes that are masked out
        # Sums of live columns, which are not taken.
        "-W", "ignore:overflow encountered in reduce:RuntimeWarning",
        # A live entry far over its estimate: its part of a sum is infinite, and so over any.
        "-W", "ignore:overflow encountered in multiply:RuntimeWarning",
        # An infinite entry of a live column, of which no part is taken.
        "-W", "ignore:invalid value encountered in multiply:RuntimeWarning",
        str(path),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=2400
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
