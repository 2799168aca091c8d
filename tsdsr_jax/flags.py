"""Reads flags from the fields of a dataclass and describes them in words."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

# Marks text that may be a path: `str` where a hub id or a word such as "none" is accepted, too.
_PERHAPS_A_PATH = "perhaps a path"
PathOrName = Annotated[str, _PERHAPS_A_PATH]


@dataclasses.dataclass(frozen=True)
class Flag:
    name: str
    hint: Any  # the field's type, `Annotated` included
    default: Any  # dataclasses.MISSING for a required flag
    aliases: tuple[str, ...]

    @property
    def display(self) -> str:
        return "--" + self.name

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def kind(self) -> Any:
        """The type without its annotations."""
        return _bare(self.hint)

    @property
    def is_bool(self) -> bool:
        return members(self.kind) in ([bool], [bool, type(None)])

    @property
    def is_switch(self) -> bool:
        """Whether tyro makes `--x` and `--no_x` of it; other booleans need a value."""
        return self.kind is bool and not self.required

    @property
    def takes_paths(self) -> bool:
        return _may_be_path(self.hint)

    @property
    def arity(self) -> tuple[int, bool]:
        """The least number of values that the flag takes, and whether more may follow."""
        arguments = typing.get_args(self.kind)
        if _is_list(self.kind):
            return 1, True
        return (len(arguments), False) if typing.get_origin(self.kind) is tuple else (1, False)

    @property
    def repeatable(self) -> bool:
        return self.arity[1]


def flags_of(options_class: type) -> list[Flag]:
    """The flags that a dataclass describes, in the order of its fields."""
    hints = typing.get_type_hints(options_class, include_extras=True)
    flags = []
    for field in dataclasses.fields(options_class):
        if not field.init:
            continue
        hint, default = hints[field.name], field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        settings = getattr(hint, "__metadata__", ())
        aliases = tuple(a for s in settings for a in getattr(s, "aliases", None) or ())
        flags.append(Flag(field.name, hint, default, aliases))
    return flags


def members(kind: Any) -> list[Any]:
    """The types of a union; for any other type, only that type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return list(typing.get_args(kind))
    return [kind]


def expected(kind: Any) -> str:
    """What a flag of this type accepts, in words."""
    arguments = typing.get_args(kind)
    names = {int: "an integer", float: "a number", bool: "true or false", Path: "a path", type(None): "None"}
    if len(members(kind)) > 1:
        return join([expected(m) for m in members(kind)], "or")
    if typing.get_origin(kind) is Annotated:
        return expected(arguments[0])
    if typing.get_origin(kind) is Literal:
        return "one of " + join([str(a) for a in arguments], "or")
    if _is_list(kind):
        return f"one or more values, each {expected(arguments[0])}"
    if typing.get_origin(kind) is tuple:
        return f"{len(arguments)} values: {', '.join(expected(a) for a in arguments)}"
    return names.get(kind, "a value")


def metavar(hint: Any) -> str:
    """The placeholder of a flag's value in `--help`: `PATH`, `INT`, `{png,jpg}`; `PATH ...` for several."""
    (kind,) = (member for member in members(_bare(hint)) if member is not type(None))
    arguments = typing.get_args(kind)
    if _is_list(kind):
        return f"{metavar(arguments[0])} ..."
    if typing.get_origin(kind) is tuple:
        return " ".join(map(metavar, arguments))
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    return "PATH" if _may_be_path(hint) else _bare(kind).__name__.upper()


def join(words: Sequence[str], conjunction: str) -> str:
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _may_be_path(hint: Any) -> bool:
    marked = _PERHAPS_A_PATH in getattr(hint, "__metadata__", ())
    return hint is Path or marked or any(map(_may_be_path, typing.get_args(hint)))


def _is_list(kind: Any) -> bool:
    """Whether values of this type are any number of values of one type."""
    origin = typing.get_origin(kind)
    return origin is list or (origin is tuple and typing.get_args(kind)[-1] is Ellipsis)
