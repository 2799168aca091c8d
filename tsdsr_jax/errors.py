"""UserError, which commands report in one clear line, and helpers for its messages."""

from collections.abc import Sequence


class UserError(Exception):
    """A problem that the user can fix: with a file, a flag or a tensor.

    The message is one sentence or a short list. It names the file, flag or tensor, what was expected and what to do.
    Commands print it without a traceback and exit with a status other than 0. Any other exception is a bug and keeps its
    traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for use in our messages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str) -> str:
    """Escapes characters that cannot be printed or stored: odd bytes in file names, line breaks and other control
    characters."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
