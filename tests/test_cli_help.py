"""`--help`: every flag of every command in one group, the required ones first, and types that a person reads."""

from __future__ import annotations

import dataclasses
import importlib
import io
import re
import shutil
import sys
from collections import Counter
from os import terminal_size
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from tsdsr_jax import cli
from tsdsr_jax.cli_help import grouped, help_text
from tsdsr_jax.commands import groups
from tsdsr_jax.flags import PathOrName, flags_of
from tsdsr_jax.hints import installed_name
from tsdsr_jax.places import CHECKOUT

SCRIPTS = sorted(
    file.relative_to(CHECKOUT).as_posix()
    for folder in ("convert", "infer", "train")
    for file in (CHECKOUT / folder).glob("[!_]*.py")
)
# These have few flags, and no groups but the required ones and the others.
WITHOUT_GROUPS = {"convert/lora.py", "convert/lpips.py", "convert/sd3.py"}


def module_of(script: str):
    name = installed_name(script).removeprefix("tsdsr-").replace("-", "_")
    return importlib.import_module(f"tsdsr_jax.commands.{name}")


def shown(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, columns: int = 100
) -> str:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: terminal_size((columns, 50)))
    with pytest.raises(SystemExit) as stopped:
        module_of(script).main()
    assert not stopped.value.code
    return capsys.readouterr().out


def sections(text: str) -> dict[str, list[str]]:
    """Title -> the flags below it."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if re.match(r"[a-z]", line) and not line.startswith(("usage:", "python ")):
            title = line
        elif flag := re.match(r"  (?:-\w, )?--(\w+)", line):
            found.setdefault(title, []).append(flag[1])
    return found


def test_there_are_eleven_commands():
    assert len(SCRIPTS) == 11


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_one_group_and_the_required_ones_come_first(script, monkeypatch, capsys):
    found = sections(shown(script, monkeypatch, capsys))
    flags = flags_of(module_of(script).Options)
    assert Counter(name for names in found.values() for name in names) == Counter(flag.name for flag in flags)
    required = [flag.name for flag in flags if flag.required]
    assert found.get("required", []) == required
    assert next(iter(found)) == "required" or not required
    assert ("options" in found) == (script in WITHOUT_GROUPS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_types_and_defaults_are_written_for_people(script, monkeypatch, capsys):
    text = shown(script, monkeypatch, capsys)
    assert not re.search(r"None\}|\{None|\|PATH|default: None|default: \)|default: False", text)
    assert not re.search(r"[Dd]efault: .*\(default: ", text)


@pytest.mark.parametrize("table", ["UPSCALING", "TRAINING", "PREPARING", "EVALUATING", "ENCODING"])
def test_groups_name_flags_that_exist_and_each_once(table):
    named = Counter(name for names in getattr(groups, table).values() for name in names)
    known = {flag.name for script in SCRIPTS for flag in flags_of(module_of(script).Options)}
    assert set(named) <= known and set(named.values()) == {1}


def test_lines_fit_the_terminal(monkeypatch, capsys):
    for columns in (60, 80, 300):
        text = shown("infer/upscale.py", monkeypatch, capsys, columns)
        below = text[text.index("required\n") :].splitlines()
        assert min(columns, 120) - 12 < max(map(len, below)) <= min(columns, 120)


@pytest.mark.parametrize(
    ("program", "named"), [("sd3.py", "infer/upscale.py"), ("tsdsr-convert-sd3", "tsdsr-upscale")]
)
def test_installed_commands_speak_of_installed_commands(program, named):
    module = module_of("convert/sd3.py")
    text = help_text(program, module.Options, module.__doc__, {})
    assert named in text and (".py" in text) == program.endswith(".py")


@dataclasses.dataclass(frozen=True)
class Base:
    name: str = "x"
    """The base's words."""
    folder: Path | None = None
    """Where, and the text goes
    on here. Default: nowhere."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Base):
    photos: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["-p"])]
    """Photographs."""
    name: str = "y"
    """Another name."""
    model: PathOrName | None = None
    size: tuple[int, int] = (3, 4)
    kind: Literal["a", "b"] | None = None
    sides: tuple[int, ...] = (1, 2)
    fast: bool = False
    safe: bool = True
    tiled: bool | None = None


def test_flags_in_words(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: terminal_size((78, 50)))
    text = help_text(
        "do.py", Example, "Does\nit.\n\n    do.py  as written", {"model": ["model", "kind"], "none": ["x"]}
    )
    expected = """\
usage: do.py -p PATH ... [options]

Does it.

    do.py  as written

required
  -p, --photos PATH ...   Photographs.

model
  --model PATH
  --kind {a,b}

options
  --name STR              Another name. (default: y)
  --folder PATH           Where, and the text goes on here. Default: nowhere.
  --size INT INT          (default: 3 4)
  --sides INT ...         (default: 1 2)
  --fast
  --safe, --no_safe       (default: on)
  --tiled, --no_tiled"""
    assert text == expected
    assert [*grouped(Example, {})] == ["required", "options"]


def test_titles_are_bold_on_a_terminal_only(monkeypatch):
    def text() -> str:
        return help_text("do.py", Example, "", {})

    assert "\x1b" not in text()
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1mrequired\x1b[0m" in text()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in text()


def test_help_wins_over_a_wrong_flag(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Example, description="", argv=["--wrong", "--help"])
    assert capsys.readouterr().out.startswith("usage: ")
