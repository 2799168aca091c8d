"""The text of `--help`: required flags first, then groups of the others."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tsdsr_jax.flags import Flag, flags_of, metavar
from tsdsr_jax.hints import installed_name

# Title -> the flags below it.
Groups = Mapping[str, Sequence[str]]

_REQUIRED, _OTHER = "required", "options"
_WIDEST = 120
_SCRIPT = re.compile(r"(?:python )?\b((?:convert|infer|train)/\w+\.py)")
_TIED = "\xa0"  # a space that lines are not broken at
_BOLD = "\x1b[1m{}\x1b[0m"


def help_text(
    program: str, options_class: type, description: str, groups: Groups, positional: str | None = None
) -> str:
    """Returns what `--help` prints, as wide as the terminal. On a terminal, titles are bold.

    Args:
      program: the command's name as the user typed it.
      options_class: the dataclass of its flags; the docstring below a field is the flag's explanation.
      description: what the command does. Command lines in it are kept unchanged; other paragraphs are filled.
      groups: titles and flags of the groups. Required flags come first, those in no group last.
      positional: the flag whose name may be left out.
    """
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    texts = dict(_docstrings(options_class))
    usage = _usage(program, flags_of(options_class), width, positional)
    parts = [usage, *_paragraphs(description, width)]
    for title, flags in grouped(options_class, groups).items():
        entries = [_entry(flag, texts.get(flag.name, ""), width) for flag in flags]
        parts.append("\n".join([_bold(title), *entries]))
    text = "\n\n".join(parts)
    # Where the command is installed, there may be no checkout with scripts.
    installed = program.startswith("tsdsr-")
    return _SCRIPT.sub(lambda found: installed_name(found[1]), text) if installed else text


def grouped(options_class: type, groups: Groups) -> dict[str, list[Flag]]:
    """Title -> its flags: the required ones, the groups, then flags that are in no group. No title is empty."""
    left = {flag.name: flag for flag in flags_of(options_class)}
    found = {_REQUIRED: [left.pop(name) for name in list(left) if left[name].required]}
    for title, names in groups.items():
        found[title] = [left.pop(name) for name in names if name in left]
    found[_OTHER] = list(left.values())
    return {title: flags for title, flags in found.items() if flags}


def _usage(program: str, flags: Sequence[Flag], width: int, positional: str | None) -> str:
    needed = []
    for flag in flags:
        if flag.required:
            name = (*flag.aliases, flag.display)[0]
            needed.append(f"{f'[{name}]' if flag.name == positional else name} {metavar(flag.hint)}")
    text = " ".join(["usage:", program, *needed, "[options]"])
    return _filled(text, width, later_lines="  ")


def _paragraphs(description: str, width: int) -> Iterator[str]:
    for text in re.split(r"\n\s*\n", inspect.cleandoc(description)):
        yield text if text.startswith((" ", "python ")) else _filled(" ".join(text.split()), width)


def _entry(flag: Flag, text: str, width: int) -> str:
    """The flag and its explanation, beside it if there is room."""
    indent = min(34, width // 3)
    head = f"  {_spelling(flag)}"
    text = _filled(" ".join([text, *_default(flag, text)]).lstrip(), width - indent)
    lines = textwrap.indent(text, " " * indent)
    beside = len(head) + 2 <= indent
    return (head.ljust(indent) + lines[indent:] if beside else f"{head}\n{lines}").rstrip()


def _spelling(flag: Flag) -> str:
    names = [*flag.aliases, flag.display]
    if not flag.is_bool:
        return f"{', '.join(names)} {metavar(flag.hint)}"
    return ", ".join(names if flag.default is False else [*names, f"--no_{flag.name}"])


def _default(flag: Flag, text: str) -> Iterator[str]:
    """The default in parentheses; empty if the text names it or there is none to show."""
    nothing: tuple[Any, ...] = (dataclasses.MISSING, None, False, (), "")
    if re.search(r"\bdefault:", text, re.IGNORECASE) or any(flag.default is each for each in nothing):
        return
    value = flag.default
    if flag.is_bool:
        value = "on"
    elif isinstance(value, (tuple, list)):
        value = " ".join(map(str, value))
    yield f"(default: {value})".replace(" ", _TIED)


def _docstrings(options_class: type) -> Iterator[tuple[str, str]]:
    """Each field's name and the docstring below it; a subclass's own follow those of its bases."""
    for each in reversed(options_class.__mro__):
        if dataclasses.is_dataclass(each):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            assert isinstance(tree, ast.ClassDef)
            for field, below in itertools.pairwise(tree.body):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    text = ast.get_docstring(ast.Module([below], []))
                    yield field.target.id, " ".join((text or "").split())


def _filled(text: str, width: int, later_lines: str = "") -> str:
    """Breaks the text into lines; all but the first begin with `later_lines`."""
    wrapper = textwrap.TextWrapper(
        max(20, width), subsequent_indent=later_lines, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(text).replace(_TIED, " ")


def _bold(title: str) -> str:
    return _BOLD.format(title) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else title
