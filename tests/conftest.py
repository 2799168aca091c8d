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
from importlib.metadata import version

import pytest

PLATFORM = os.environ.get("TSDSR_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
# Scripts keep compiled programs. Those of the tests are shared by all their processes, and thrown away by the first.
_PROGRAMS = None
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    _PROGRAMS = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tsdsr-programs-")
if PLATFORM == "cpu":
    # Compiling is most of what the suite does. This has LLVM hurry, on one core; XLA's passes are as they are for users,
    # but for the older of its two ways from a fusion to code, a third cheaper, while it has both.
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
    # Tolerances are float32's; GPUs round the factors of float32 products to TF32 unless told otherwise.
    jax.config.update("jax_default_matmul_precision", "highest")

# CI fails on any other skip: a test that never runs is worse than none, because it looks like one.
EXPECTED_SKIPS = (r"\bshared/data\b", r"\bGPUs?\b", r"\bright to mount\b")
# Python 3.11 is the version that is tested with PyTorch (see the Makefile).
EXPECTED_SKIPS_WITHOUT_TORCH = (
    r"\b(torch|pytorch|torchvision|transformers|diffusers|peft|accelerate|sentencepiece)\b",
)

_unexpected_skips: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def light_collections() -> None:
    """Leaves what earlier modules and imports have made out of garbage collections, which took a fifth of the time."""
    gc.collect()
    gc.freeze()


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


# Few tests that take long. Files go to the test processes in order: what takes long must not be left for the end, when
# the others have nothing to do.
FIRST = (
    "test_distill_processes.py",
    "test_gpu_programs.py",
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
