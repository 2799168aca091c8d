"""The rule that CI fails on skips nobody expects."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import is_expected_skip


@pytest.mark.parametrize(
    ("reason", "python", "expected"),
    [
        ("Skipped: could not import 'torch': No module named 'torch'", (3, 12), True),
        ("Skipped: could not import 'diffusers': No module named 'diffusers'", (3, 12), True),
        ("Skipped: could not import 'torch': No module named 'torch'", (3, 11), False),
        ("Skipped: could not import 'scipy': No module named 'scipy'", (3, 12), False),
        ("Skipped: ../shared/data is not there", (3, 11), True),
        ("Skipped: needs a GPU", (3, 11), True),
        (
            "Skipped: JAX's CUDA plugin is not in .venv/cuda-compiler-0.10.2: make cuda-compiler",
            (3, 11),
            False,
        ),
        ("Skipped: flaky", (3, 12), False),
    ],
)
def test_expected_skips(reason, python, expected):
    assert is_expected_skip(reason, python) is expected


@pytest.mark.parametrize(
    ("reason", "ci", "status"), [("flaky", "true", 1), ("flaky", "", 0), ("needs a GPU", "true", 0)]
)
def test_exit_status(tmp_path: Path, reason, ci, status):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n\n@pytest.mark.skip(reason={reason!r})\ndef test_a(): pass\n\ndef test_b(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "test_one.py"]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"CI": ci}, capture_output=True, text=True
    )
    assert result.returncode == status, result.stdout + result.stderr
    assert ("test_one.py::test_a" in result.stdout) is bool(status)
    assert "1 passed, 1 skipped" in result.stdout.splitlines()[-1]
