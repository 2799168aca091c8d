"""Set before any test module imports jax or torch: where the tests run, how they compile, and what may be skipped.

The suite runs on eight virtual CPU devices, so that sharding is exercised everywhere. TSDSR_TEST_PLATFORM=cuda (or tpu)
runs it on what the machine has instead.
"""

import gc
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

PLATFORM = os.environ.get("TSDSR_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
# Scripts keep compiled programs on disk. The tests' processes share a folder for them, which the first one removes.
_PROGRAMS = None
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    _PROGRAMS = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tsdsr-programs-")
if PLATFORM == "cpu":
    # The suite spends most of its time compiling. These flags let LLVM optimize less, on one core. XLA's own passes stay as
    # for users, except that it generates code in its older way, which is a third cheaper, while it has both.
    hurry = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):
        hurry += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{hurry} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # torch's threads; more only fight with XLA's over these tiny tensors

import jax  # noqa: E402

if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
else:
    # Tolerances are for float32, but by default GPUs round the factors of float32 products to TF32.
    jax.config.update("jax_default_matmul_precision", "highest")

# CI fails on any other skip, because a test that never runs is worse than no test.
EXPECTED_SKIPS = (r"\bshared/data\b", r"\bGPUs?\b", r"\bright to mount\b")
# Python 3.11 is the version that is tested with PyTorch (see the Makefile).
EXPECTED_SKIPS_WITHOUT_TORCH = (
    r"\b(torch|pytorch|torchvision|transformers|diffusers|peft|accelerate|sentencepiece)\b",
)

_unexpected_skips: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def light_collections() -> None:
    """Excludes objects of earlier modules and imports from garbage collection, which took a fifth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of compiled programs, for `quick_compilation` and for processes that a test starts."""
    return tmp_path_factory.getbasetemp() / "compiled"


@pytest.fixture(scope="module")
def quick_compilation(cache: Path) -> Iterator[None]:
    """Keeps compiled programs, so that equal networks of a process's tests are compiled once."""
    from tiny_checkpoint import compiled_once

    with compiled_once(cache):
        yield


def is_expected_skip(reason: str, python: tuple[int, int] = sys.version_info[:2]) -> bool:
    patterns = EXPECTED_SKIPS + (EXPECTED_SKIPS_WITHOUT_TORCH if python >= (3, 12) else ())
    return any(re.search(pattern, reason, re.IGNORECASE) for pattern in patterns)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not is_expected_skip(reason):
        _unexpected_skips.append(f"{report.nodeid}: {reason}")


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true")


# Files with few but slow tests. Test processes receive files in order, so that slow ones must come first; at the end, other
# processes would wait for them.
FIRST = (
    "test_distill_processes.py",
    "test_training_scripts.py",
    "test_parity.py",
    "test_sharding.py",
    "test_losses.py",
    "test_demo.py",
    "test_docs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _PROGRAMS is not None:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)
    if _in_ci() and _unexpected_skips and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _in_ci() and _unexpected_skips:
        terminalreporter.section(
            "skips that CI does not expect (tests/conftest.py lists those it does)", red=True
        )
        for line in _unexpected_skips:
            terminalreporter.line(line, red=True)
