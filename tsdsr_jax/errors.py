"""The one exception that scripts turn into a single clear line, and what its messages are made of."""

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can put right: a file, a flag, a tensor.

    The message is one sentence or a short list. It names the file, tensor or flag, says what was expected and what to do.
    Scripts print it without a traceback and exit non-zero; any other exception is a bug and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, for use inside a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str) -> str:
    """A name as it can be printed and stored: odd bytes of file names, line ends and other control characters escaped."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
