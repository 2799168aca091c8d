"""Serves a page in the browser that upscales photographs with SD3 and TSD-SR's LoRAs; or, where no model is named, with a
small one that lies in the repository.

python infer/app.py --pretrained_model_name_or_path sd3
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import socket
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

from tsdsr_jax import cli
from tsdsr_jax.commands.groups import UPSCALING
from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.upscaling.options import UpscaleOptions, check, completed, load


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
    options = completed(cli.parse(Options, description=__doc__, groups=UPSCALING))
    check(options)
    check_server(options)
    with private_folder() as root, ended_by_signals(root):
        run(options, root)


def run(options: Options, root: Path) -> None:
    """Loads the networks and serves the page until a signal comes.

    Args:
      root: from `private_folder`.

    Raises:
      UserError: Gradio is not installed, a flag is out of its range, or the networks cannot be loaded.
    """
    page = import_page()
    if abs(options.seed) > page.LARGEST_WHOLE:
        raise UserError(
            f"--seed {options.seed}: expected at most 2**53, up or down; browsers round beyond it"
        )
    devices = select_devices(options.device)
    upscaler = load(options, options.settings(devices[0].platform), devices)
    blocks = page.build(upscaler, options, root, options.max_waiting)
    page.serve(blocks, options.host, options.port, options.max_upload)
    print(f"ready: {addresses(options.host, options.port)} (Ctrl-C ends it)", flush=True)
    while True:
        time.sleep(3600)


def addresses(host: str, port: int) -> str:
    """Where a browser finds the page, in words; 0.0.0.0 and :: are addresses to listen at, not to go to."""
    *_, (meant, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if meant in ("0.0.0.0", "::"):
        return f"http://localhost:{port}/, from other machines http://{socket.gethostname()}:{port}/"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder for uploads and results, the only one that Gradio serves files of; removed at the end.

    Gradio reads the variable while it is imported and makes folders in it when it starts, so this comes before both.

    Raises:
      UserError: no temporary folder can be made.
    """
    try:
        root = Path(tempfile.mkdtemp(prefix="tsdsr_page_")).resolve()
    except OSError as error:
        raise UserError(f"no temporary folder can be made ({error.strerror}); set TMPDIR") from None
    os.environ["GRADIO_TEMP_DIR"] = str(root)
    try:
        yield root
    finally:
        remove(root)


@contextlib.contextmanager
def ended_by_signals(root: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once, without the folder `root`.

    Not by an exception: while libraries load, one may be raised where Python only prints and ignores it.
    """

    def leave(number: int, frame: object) -> None:
        for each in before:  # further signals do not disturb the removal
            signal.signal(each, signal.SIG_IGN)
        remove(root)
        if number == signal.SIGINT:
            os.write(2, b"interrupted\n")  # a print may have been interrupted
        # A photograph under way cannot be stopped, and leaving should not wait for it.
        os._exit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def remove(folder: Path) -> None:
    """Removes a folder, again where a thread has put another file into it meanwhile."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def check_server(options: Options) -> None:
    """Refuses flags that the server could not start with, before the networks are loaded.

    Raises:
      UserError: a flag is out of its range, or the address or the port cannot be listened at.
    """
    cli.at_least(options, 1, "max_upload", "max_waiting")
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
    """`tsdsr_jax.upscaling.app`, with Gradio's telemetry off.

    Raises:
      UserError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from tsdsr_jax.upscaling import app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio: pip install 'tsdsr_jax[app]'") from None
    return app
