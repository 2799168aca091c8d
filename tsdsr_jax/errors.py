"""The one exception that scripts turn into a single clear line."""


class UserError(Exception):
    """Something the user can put right: a file, a flag, a tensor.

    The message is one sentence or a short list. It names the file, tensor or flag, says what was expected and what to do.
    Scripts print it without a traceback and exit non-zero; any other exception is a bug and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, for use inside a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
