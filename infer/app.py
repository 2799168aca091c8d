"""Serves a page in the browser that upscales photographs with SD3 and TSD-SR's LoRAs.

python infer/app.py --pretrained_model_name_or_path sd3
"""

from __future__ import annotations

if __name__ == "__main__":
    # Ctrl-C while the libraries load: leave at once. `cli.run` takes over when the work begins.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import errno
import os
import signal
import socket
import sys
import time
import types

from tsdsr_jax import cli
from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.upscale_options import UpscaleOptions, check, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(UpscaleOptions):
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 lets other machines in, too; there is no password."""
    port: int = 7860
    """Port to listen at."""
    max_upload: int = 30
    """Largest photograph, in megabytes."""
    max_waiting: int = 16
    """Photographs that may wait for their turn; one is computed at a time."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    check(options)
    check_server(options)
    page = import_page()
    devices = select_devices(options.device)
    upscaler = load(options, options.settings(devices[0].platform), devices)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        with page.private_folder() as root:
            blocks = page.build(upscaler, options, root, options.max_waiting)
            url = page.serve(blocks, options.host, options.port, options.max_upload)
            print(f"ready: {url} (Ctrl-C ends it)", flush=True)
            while True:
                time.sleep(3600)
    except _Left as left:
        if left.number == signal.SIGINT:
            print("interrupted", file=sys.stderr, flush=True)
        # A photograph under way cannot be stopped, and leaving should not wait for it.
        os._exit(128 + left.number)


class _Left(BaseException):
    """A signal has asked the server to end."""

    def __init__(self, number: int):
        self.number = number


def leave(number: int, frame: object) -> None:
    """Ends the server; further signals do not disturb the removal of its temporary folder."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise _Left(number)


def check_server(options: Options) -> None:
    """Refuses flags that the server could not start with, before the networks are loaded.

    Raises:
      UserError: a flag is out of its range, or the address or the port cannot be listened at.
    """
    for flag in ("max_upload", "max_waiting"):
        if (value := getattr(options, flag)) < 1:
            raise UserError(f"--{flag} {value}: expected at least 1")
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: expected 1 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {options.host}: no such address; 127.0.0.1 is this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {options.port}: in use; choose another, or end what uses it") from None
        flag = "--port" if error.errno == errno.EACCES else "--host"
        value = getattr(options, flag[2:])
        raise UserError(f"{flag} {value}: cannot be listened at ({error.strerror}); choose another") from None


def import_page() -> types.ModuleType:
    """`tsdsr_jax.page`, with Gradio's telemetry off.

    Raises:
      UserError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from tsdsr_jax import page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: pip install 'tsdsr_jax[app]'") from None
    return page


if __name__ == "__main__":
    cli.run(main)
