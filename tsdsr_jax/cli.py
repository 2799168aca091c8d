"""Command lines: a frozen dataclass lists the flags, and every mistake gets a one-line message.

    options = cli.parse(Options, description="Upscale photographs.")    # exits 2 on a bad command line
    cli.run(main)                                                       # exits 1 on a UserError

tyro converts the values. This module handles what tyro does not: booleans that may have a value, suggestions for
misspelled flags, and messages of one line. `cli_help` writes `--help`.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from tsdsr_jax import peers, storage
from tsdsr_jax.cli_help import Groups, help_text
from tsdsr_jax.errors import UserError
from tsdsr_jax.flags import Flag, expected, flags_of, join, members
from tsdsr_jax.flags import PathOrName as PathOrName
from tsdsr_jax.launchers import launched

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OptionsClass = TypeVar("OptionsClass", bound="DataclassInstance")

_BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "0"), False
)
_NEGATIVE_NUMBER = re.compile(r"-(\.?\d|inf\b|nan\b)", re.IGNORECASE)
# Flags that name what a command writes; all other paths are read.
_WRITTEN_FOLDER = "output_dir"
_RESUMED = "resume_from_checkpoint"
_WRITTEN = ("output", "log", "report", "preview", "logging_dir")
_LARGEST_FLOAT32 = 3.4028234e38


class _UsageError(Exception):
    """The command line cannot be understood; the message is the line to print."""


def parse(
    options_class: type[OptionsClass],
    *,
    description: str | None,
    groups: Groups | None = None,
    positional: str | None = None,
    argv: Sequence[str] | None = None,
) -> OptionsClass:
    """Reads the command line into `options_class`.

    `--align_method` and `--align-method` are the same flag, and so are `--flag value` and `--flag=value`. A boolean can be
    bare (`--is_use_tile`), negated (`--no_is_use_tile`) or have a value (`--is_use_tile false`). Flags of type
    `tuple[T, ...]` may be repeated; for other flags the last one counts. In paths `~` means the home folder, because shells
    do not expand it in `--flag=~/x`. Instead of a path, a URL of an object store may be given; see `storage`.

    Args:
      options_class: a frozen dataclass of plain values. The docstring below a field is its help text; short
        names come from `Annotated[..., tyro.conf.arg(aliases=["-i"])]`.
      description: what the command does, usually its module's docstring; the first paragraphs of `--help`.
      groups: how `--help` arranges the flags.
      positional: the flag that values without a flag belong to; one that may be repeated.
      argv: the arguments without the script's name; `sys.argv[1:]` when absent.

    A mistake in the command line ends the process with status 2 and one line on stderr.

    Raises:
      UserError: something in an object store is not there or cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = flags_of(options_class)
    try:
        if any(token in ("-h", "--help") for token in argv):
            print(help_text(script_name(), options_class, description or "", groups or {}, positional))
            raise SystemExit(0)
        given = _read(argv, flags, positional)
        for flag in flags:
            if flag.takes_paths and flag.name in given:
                given[flag.name] = [os.path.expanduser(value) for value in given[flag.name]]
        missing = [f.display for f in flags if f.required and f.name not in given]
        if missing:
            raise _UsageError(f"{join(missing, 'and')} must be given; --help explains the flags")
        options = _convert(options_class, flags, given)
        # Nothing is copied before the whole line is known to make sense.
        if _bring_here(flags, given):
            options = _convert(options_class, flags, given)
    except _UsageError as error:
        print(f"{script_name()}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    # tyro appends the values of a repeatable flag to its default; here they replace it.
    own = {
        f.name: getattr(options, f.name)[len(f.default) :]
        for f in flags
        if f.repeatable and f.name in given and not f.required
    }
    return dataclasses.replace(options, **own) if own else options


def _bring_here(flags: Sequence[Flag], given: dict[str, list[str]]) -> bool:
    """Replaces the URLs among the values by paths of copies on this machine; returns whether there were any."""
    named = [
        flag for flag in flags if flag.takes_paths and any(map(storage.is_url, given.get(flag.name, [])))
    ]
    for flag in named:
        if flag.name in _WRITTEN:
            raise UserError(
                f"{flag.display} {given[flag.name][-1]}: cannot be written there; give a path on this machine, and copy the "
                "result"
            )
    outputs = [value for value in given.get(_WRITTEN_FOLDER, []) if storage.is_url(value)]
    for url in outputs:
        resumed = given.get(_RESUMED, [""])[-1]
        within = resumed[len(url.rstrip("/")) + 1 :] if resumed.startswith(url.rstrip("/") + "/") else resumed
        given[_WRITTEN_FOLDER] = [
            str(storage.output_folder(url, f"--{_WRITTEN_FOLDER}", wanted=within.strip("/")))
        ]
    for flag in named:
        if flag.name != _WRITTEN_FOLDER:
            given[flag.name] = [_copy_of(flag, value, outputs) for value in given[flag.name]]
    return bool(named)


def _copy_of(flag: Flag, value: str, outputs: Sequence[str]) -> str:
    if not storage.is_url(value):
        return value
    if flag.name == _RESUMED and (path := storage.below_output(value)):
        return str(path)
    return str(storage.fetched(value, flag.display, outputs))


def run(main: Callable[[], object]) -> None:
    """Calls `main` and ends the process as a command-line tool should.

    A `UserError` becomes one line on stderr and status 1. Ctrl-C prints `interrupted` and gives status 130. A reader that
    closes the pipe early (`... | head`) gets no message. A full disk, and a current folder that was removed, are named. Any
    other exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # Do not fail on characters that the terminal cannot show, nor on odd bytes in file names.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(ValueError):  # outside the main thread, where handlers cannot be set
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _check_current_folder()
        with storage.urls_in_output():
            try:
                main()
            except BaseException:
                _bring_what_there_is()
                raise
            storage.finish_all()
        sys.stdout.flush()
        peers.ended(0)
    except UserError as error:
        message = storage.as_given(str(error))
        print(f"{script_name()}: {message}", file=sys.stderr)
        peers.ended(1, message)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        peers.ended(130, "interrupted")
        raise SystemExit(130) from None
    except SystemExit as end:
        # Statuses above 128 are those of signals, which stop all processes alike.
        fault = end.code is not None and not (isinstance(end.code, int) and (end.code == 0 or end.code > 128))
        peers.ended(1, f"it ended with status {end.code}" if fault else "")
        raise
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(141) from None  # 128 + SIGPIPE, as a shell reports it
    except OSError as error:
        if error.errno != errno.ENOSPC:
            _end_by_bug(error)
            raise
        place = error.filename or "the file that receives this command's output"
        print(f"{script_name()}: {place}: the disk is full; make room and run it again", file=sys.stderr)
        _discard_output()
        peers.ended(1, "the disk is full")
        raise SystemExit(1) from None
    except Exception as error:
        _end_by_bug(error)
        raise


def _bring_what_there_is() -> None:
    """Brings results to a store after an error, which is what the command ends with; a second one is only told."""
    try:
        storage.finish_all()
    except UserError as error:
        print(f"{script_name()}: {error}", file=sys.stderr)


def _end_by_bug(error: Exception) -> None:
    """Tells other processes, if there are any. They get the traceback's last line, this one prints all of it."""
    if peers.has_peers():
        peers.wait_for_reason()  # the error may be another process's end, which ends this one, too
        traceback.print_exception(error)
        peers.ended(1, f"{type(error).__name__}: {error}")


def _check_current_folder() -> None:
    """Raises UserError if it was removed, after which no relative path means anything."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder was removed; change into another one") from None


def _discard_output() -> None:
    """The interpreter flushes stdout once more when it exits; lets it write to nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def at_least(options: Any, bound: int, *names: str) -> None:
    """Raises UserError for the first named flag that is below `bound` or not a number; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not bound <= value < float("inf"):
            raise UserError(f"--{name} {value:g}: expected at least {bound}")


def finite(options: Any) -> None:
    """Raises UserError for the first float that is not finite in float32, the type that computations use."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, float) and not abs(value) <= _LARGEST_FLOAT32:
            raise UserError(f"--{field.name} {value:g}: expected a finite number in float32")


def script_name() -> str:
    return Path(sys.argv[0]).name


def _read(argv: list[str], flags: list[Flag], positional: str | None = None) -> dict[str, list[str]]:
    """Splits the arguments into each flag's values, still as text; values without a flag are those of `positional`."""
    by_spelling: dict[str, tuple[Flag, bool]] = {}
    for known in flags:
        if known.is_bool and not known.required:
            by_spelling["--no_" + known.name] = (known, False)
    for known in flags:  # after the negations, so that a field whose own name begins with `no_` wins
        by_spelling |= dict.fromkeys((known.display, *map(_canonical, known.aliases)), (known, True))

    given: dict[str, list[str]] = {}
    flag: Flag | None = None
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if _is_value(token) and positional:
            given[positional] = [*given.get(positional, []), token]
            continue
        if _is_value(token):
            after = f" after {flag.display}, which takes {expected(flag.kind)}" if flag else ""
            raise _UsageError(f"unexpected argument '{token}'{after or '; every value follows its flag'}")
        spelling, has_value, attached = token.partition("=")
        if _canonical(spelling) not in by_spelling:
            raise _UsageError(f"unknown flag {spelling}{_suggestion(spelling, list(by_spelling))}")
        flag, positive = by_spelling[_canonical(spelling)]

        if flag.is_bool:
            if not positive and has_value:
                raise _UsageError(f"{_canonical(spelling)} takes no value; {flag.display} does")
            if not has_value and positive and rest and rest[0].lower() in _BOOLEANS:
                attached, has_value = rest.pop(0), "="
            is_none = attached == "None" and type(None) in members(flag.kind)
            if has_value and attached.lower() not in _BOOLEANS and not is_none:
                raise _bad_value(flag, [attached])
            given[flag.name] = [attached if has_value else str(positive)]
            continue

        values = [attached] if has_value else []
        count, more = flag.arity
        while rest and (len(values) < count or (more and not has_value)) and _is_value(rest[0]):
            values.append(rest.pop(0))
        if len(values) < count:
            hint = (
                f"; write {shlex.quote(f'{flag.display}={rest[0]}')} if {rest[0]} is its value"
                if rest
                else ""
            )
            raise _UsageError(f"{flag.display} needs {expected(flag.kind)}{hint}")
        given[flag.name] = given.get(flag.name, []) + values if flag.repeatable else values
    return given


def _canonical(spelling: str) -> str:
    """`--align-method` -> `--align_method`; short names stay as they are."""
    return "--" + spelling[2:].replace("-", "_") if spelling.startswith("--") else spelling


def _is_value(token: str) -> bool:
    return not token.startswith("-") or token == "-" or _NEGATIVE_NUMBER.match(token) is not None


def _suggestion(spelling: str, known: list[str]) -> str:
    # `-input_dir` is a typo of `--input_dir`, and `--align` the start of `--align_method`.
    wanted = _canonical("--" + spelling.lstrip("-").lower())
    starts = [k for k in known if len(wanted) > 3 and k.startswith(wanted)]
    # Long names are never typos of one-letter ones, or vice versa.
    close = difflib.get_close_matches(wanted, [k for k in known if k.startswith("--")], n=1, cutoff=0.7)
    found = starts[:1] or close
    return f"; did you mean {found[0]}?" if found else "; --help lists the flags"


def _convert(
    options_class: type[OptionsClass], flags: list[Flag], given: dict[str, list[str]]
) -> OptionsClass:
    arguments = [token for f in flags if f.name in given for token in _spell(f, given[f.name])]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return _tyro(options_class, arguments)
    except SystemExit:
        for flag in flags:
            if flag.name in given and not flag.is_bool and not _accepts(flag, given[flag.name]):
                raise _bad_value(flag, given[flag.name]) from None
        # Each value is fine by itself, so the class refused the combination (ValueError in `__post_init__`).
        raise _UsageError(_unframed(said.getvalue())) from None


def _spell(flag: Flag, values: list[str]) -> Iterator[str]:
    """Spells the flag so that tyro cannot misread it, whatever the values look like."""
    if flag.is_bool and values != ["None"]:
        truth = _BOOLEANS[values[0].lower()]
        yield f"--{'' if truth else 'no_'}{flag.name}" if flag.is_switch else f"{flag.display}={truth}"
    elif flag.repeatable:
        yield from (f"{flag.display}={value}" for value in values)
    else:
        yield f"{flag.display}={values[0]}"
        yield from values[1:]


def _accepts(flag: Flag, values: list[str]) -> bool:
    """Whether tyro can convert this flag's values, tried with a class that has no other field."""
    alone = dataclasses.make_dataclass("Alone", [(flag.name, flag.hint)])
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            _tyro(alone, list(_spell(flag, values)))
        except SystemExit:
            return False
    return True


def _tyro(options_class: type[OptionsClass], arguments: list[str]) -> OptionsClass:
    return tyro.cli(options_class, args=arguments, use_underscores=True, config=(tyro.conf.UseAppendAction,))


def _bad_value(flag: Flag, values: list[str]) -> _UsageError:
    return _UsageError(f"{flag.display} was given '{' '.join(values)}'; expected {expected(flag.kind)}")


def _unframed(text: str) -> str:
    """Turns tyro's message, which is drawn in a box, into one line."""
    lines = [line.strip("│╭╮╰╯─|+- ") for line in text.splitlines()]
    lines = [line for line in lines if line and line != "Value error" and "For full helptext" not in line]
    message = re.sub(r"^Error parsing \w+: ", "", " ".join(lines))
    return message or "the flags do not fit together"


@dataclasses.dataclass(frozen=True)
class Share:
    """One machine's part of the work: every `of`-th piece, starting at number `index`."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}-of-{self.of}"


EVERYTHING = Share(0, 1)


def share(text: str | None, flag: str = "--shard") -> Share:
    """Reads a flag's "i/n"; raises UserError for anything else.

    Without it, each process that a launcher has started takes its part.
    """
    if text is None:
        found = launched()
        return Share(found.process, found.processes) if found else EVERYTHING
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"{flag} {text}: expected i/n with 0 ≤ i < n, such as 0/4")
    return Share(int(match[1]), int(match[2]))


def check_writable(folder: Path, flag: str = "--output_dir") -> None:
    """Raises UserError if a flag's folder cannot be created or written; does not create it."""
    for link in (folder, *folder.parents):
        if link.is_symlink() and not link.exists():
            raise UserError(f"{flag} {folder}: {link} is a link that leads nowhere; is its disk mounted?")
    place = folder.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{flag} {folder}: {place} is a file; expected a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {place} is not writable")
