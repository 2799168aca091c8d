"""The core is mathematics: it must import with nothing but jax, flax and numpy, and have no effect on import."""

import subprocess
import sys
from pathlib import Path

import pytest

from tsdsr_jax import models

FORBIDDEN = (
    "torch",
    "optax",
    "orbax",
    "grain",
    "PIL",
    "cv2",
    "safetensors",
    "huggingface_hub",
    "tyro",
    "transformers",
)
CORE = (
    *(
        f"models.{file.stem}"
        for file in sorted(Path(models.__file__).parent.glob("*.py"))
        if file.stem != "__init__"
    ),
    "distillation.tsd",
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_jax_flax_and_numpy_only(module):
    # flax itself imports some of these if they are there, so what counts is that ours do not need them.
    blocked = f"""
import builtins, sys
real = builtins.__import__
def guarded(name, globals=None, *rest):
    caller = (globals or {{}}).get("__name__", "")
    if caller.startswith("tsdsr_jax") and name.split(".")[0] in {FORBIDDEN!r}:
        raise AssertionError(f"{{caller}} imports {{name}}")
    return real(name, globals, *rest)
builtins.__import__ = guarded
import tsdsr_jax.{module}
print("imported")
"""
    result = run(blocked)
    assert result.stdout == "imported\n", result.stderr


def test_importing_the_library_starts_no_backend():
    code = (
        "from tsdsr_jax.commands import autoencoder, distill, evaluate, teacher, upscale; "
        "from jax._src import xla_bridge; "
        "print(xla_bridge.backends_are_initialized())"
    )
    result = run(code)
    assert result.stdout == "False\n", result.stderr


def test_upscaling_needs_no_torch():
    result = run(
        "import sys; sys.modules['torch'] = None; from tsdsr_jax.commands import upscale, evaluate, distill, autoencoder, "
        "convert_sd3, convert_lora, convert_lpips; "
        "print('fine')"
    )
    assert result.stdout == "fine\n", result.stderr
