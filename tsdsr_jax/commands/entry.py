"""Entry points of all commands: of the installed `tsdsr-...`, and of the scripts in `convert/`, `train/` and `infer/`.

Nothing heavy is imported before Ctrl-C is handled.
"""

from __future__ import annotations

import importlib
import os
import signal

# JAX reserves this share of a GPU's memory when it starts, by itself 0.75. The rest is left to CUDA and its libraries.
_GPU_SHARE = "0.92"
_GPU_MEMORY_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)


def _run(name: str) -> None:
    """Runs `main` of a module in this package as a command-line tool."""
    # While the libraries load, Ctrl-C ends the process at once. `cli.run` handles it when the work begins.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # `evaluate` leaves more to PyTorch's metrics, which may run on the same GPU.
    if name != "evaluate" and not any(variable in os.environ for variable in _GPU_MEMORY_VARIABLES):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = _GPU_SHARE
    # XLA's alarms about slow compilations, in red, ask for a bug report. What fails raises an exception, too.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main = importlib.import_module(f"tsdsr_jax.commands.{name}").main
    importlib.import_module("tsdsr_jax.cli").run(main)


def convert_sd3() -> None:
    _run("convert_sd3")


def convert_lora() -> None:
    _run("convert_lora")


def convert_prompts() -> None:
    _run("convert_prompts")


def convert_lpips() -> None:
    _run("convert_lpips")


def distill() -> None:
    _run("distill")


def teacher() -> None:
    _run("teacher")


def autoencoder() -> None:
    _run("autoencoder")


def prepare() -> None:
    _run("prepare")


def upscale() -> None:
    _run("upscale")


def evaluate() -> None:
    _run("evaluate")


def app() -> None:
    _run("app")
