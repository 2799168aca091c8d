"""Commands for the user to run next: complete, quoted, and valid in the user's current folder."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tsdsr_jax import storage
from tsdsr_jax.places import CHECKOUT, shipped

PHOTOS = shipped("photos", "examples/photos")
# Where train/distill.py looks for LPIPS's weights.
LPIPS_FILE = Path("checkpoint/lpips_alex.safetensors")

# Flags that commands share.
MODEL = ("pretrained_model_name_or_path", "revision", "variant")
CROPS = ("crop_size", "min_size", "small_photos", "photo_side", "sharpen_gt", "jpeg", "degradation_strength")
DATA = ("data_dir", "hr_dir", *CROPS, "default_embedding_dir", "null_embedding_dir")
STEPS = ("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "fsdp",
         "dataloader_num_workers")  # fmt: skip


def command(script: str, /, **flags: Any) -> str:
    """A command line.

    Args:
      script: its path in the repository.
      flags: name -> value. None omits the flag; a tuple gives it several values.
    """
    return shlex.join([*_program(script), *_words(flags)])


def _program(script: str) -> list[str]:
    """The script; without a checkout, the installed command."""
    file = CHECKOUT / script
    if file.is_file():
        return [interpreter(), shown(file)]
    return [installed_name(script)]


def installed_name(script: str) -> str:
    """The installed command for a script: `train/distill.py` -> `tsdsr-distill`."""
    name = script.removesuffix(".py").replace("convert/", "convert-").rpartition("/")[2]
    return f"tsdsr-{name}"


def interpreter() -> str:
    """The command that starts this Python interpreter."""
    found = shutil.which("python")
    # Not `samefile`: an environment's interpreter is a link to one outside, which lacks the environment's packages.
    if found and _place(found) == _place(sys.executable):
        return "python"
    path = shown(Path(sys.executable))
    return path if "/" in path else sys.executable  # a shell would look up a bare name on PATH


def _place(file: str) -> tuple[str, str]:
    return os.path.realpath(os.path.dirname(file)), os.path.realpath(file)


def shown(value: Any) -> str:
    """A flag's value as text; absolute paths below the current folder become relative."""
    if (named := storage.as_given(str(value))) != str(value):
        return named
    short = isinstance(value, Path) and value.is_relative_to(Path.cwd())
    return str(value.relative_to(Path.cwd()) if short else value)


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    for name, value in flags.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no_{name}"
        elif value is not None:
            values = [shown(each) for each in (value if isinstance(value, tuple) else (value,))]
            # A value that begins like a flag must be joined to its own flag.
            tied = any(each[:1] == "-" for each in values)
            yield from [f"--{name}={each}" for each in values] if tied else [f"--{name}", *values]


def given(options: Any, *names: str) -> dict[str, Any]:
    """The flags among `names` that the options have and that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    return {
        name: getattr(options, name)
        for name in names
        if name in defaults and getattr(options, name) != defaults[name]
    }


def new_folder(run: Path, word: str) -> Path:
    """A folder beside `run` that does not exist yet, named after it: `RUN-WORD`, or `RUN-WORD-2` and so on."""
    run = run.resolve() if run.name in ("", "..") else run
    names = (f"{run.name}-{word}{number}" for number in ("", *(f"-{count}" for count in range(2, 1000))))
    return next(path for name in names if not (path := run.with_name(name)).exists())


def first_run() -> str:
    """The command for a first training run, with nothing but what comes with this library."""
    model = shipped("tiny", "weights/tiny")
    flags: dict[str, Any] = dict(
        pretrained_model_name_or_path=model,
        hr_dir=PHOTOS,
        use_teacher_lora=True,
        teacher_lora_path=model / "teacher",
        checkpoint_path=model / "lora",
        guidance_scale=1,
        lambda_lpips=0,
        degradation_strength="light",
        train_batch_size=2,
        max_train_steps=20,
        mixed_precision="no",
    )
    return command("train/distill.py", **flags, output_dir=new_folder(Path("runs/first"), "run"))


def distilling(run: Path, flags: Mapping[str, Any]) -> str:
    """The command to distill with these flags after `run`; it leaves out LPIPS if there are no weights for it."""
    lpips = None if LPIPS_FILE.is_file() else 0
    return command("train/distill.py", **flags, lambda_lpips=lpips, output_dir=new_folder(run, "distilled"))
