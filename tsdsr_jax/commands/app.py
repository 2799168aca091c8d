"""Serves a web page that upscales photographs with SD3 and TSD-SR's LoRAs. Without a model it uses the small
bundled one.

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
from tsdsr_jax.upscaling.loading import load_engine
from tsdsr_jax.upscaling.options import UpscaleOptions, check_upscale_options, complete_options
from tsdsr_jax.upscaling.page_pictures import LARGEST_WHOLE
from tsdsr_jax.upscaling.upscaler import Upscaler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(UpscaleOptions):
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 also lets other machines in; there is no password."""
    port: int = 7860
    """Port to listen on, 1 to 65535."""
    max_upload: int = 30
    """Largest upload, in megabytes."""
    max_waiting: int = 16
    """Number of photographs that may wait for their turn; one is computed at a time."""


def main() -> None:
    options = complete_options(cli.parse(Options, description=__doc__, groups=UPSCALING))
    check_upscale_options(options)
    _check_server(options)
    with private_folder() as root, _ended_by_signals(root):
        _run(options, root)


def _run(options: Options, root: Path) -> None:
    """Loads the networks and serves the page until a signal comes.

    Args:
      root: from `private_folder`.

    Raises:
      UserError: Gradio is not installed, a flag is out of range, or the networks cannot be loaded.
    """
    app = _import_app()
    if abs(options.seed) > LARGEST_WHOLE:
        raise UserError(f"--seed {options.seed}: expected -2**53 to 2**53; browsers round larger numbers")
    upscaler = Upscaler(load_engine(options, select_devices(options.device)), options)
    page = app.build_page(upscaler, root, options.max_waiting)
    app.serve_page(page, options.host, options.port, options.max_upload)
    print(f"ready: {addresses(options.host, options.port)} (Ctrl-C stops it)", flush=True)
    while True:
        time.sleep(3600)


def addresses(host: str, port: int) -> str:
    """Says where a browser finds the page; 0.0.0.0 and :: are addresses to listen on, not to visit."""
    *_, (meant, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if meant in ("0.0.0.0", "::"):
        return f"http://localhost:{port}/, from other machines http://{socket.gethostname()}:{port}/"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Makes a temporary folder for uploads and results, the only one that Gradio serves; removes it at the end.

    Gradio reads its name from the environment on import, so this comes first.

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
        _remove(root)


@contextlib.contextmanager
def _ended_by_signals(root: Path) -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM remove the folder `root` and end the process at once.

    It raises no exception: while libraries load, Python may only print one and go on.
    """

    def leave(number: int, frame: object) -> None:
        for each in before:  # further signals do not disturb the removal
            signal.signal(each, signal.SIG_IGN)
        _remove(root)
        if number == signal.SIGINT:
            os.write(2, b"interrupted\n")  # a print may have been interrupted
        # A photograph that is being computed cannot be stopped, and leaving should not wait for it.
        os._exit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove(folder: Path) -> None:
    """Removes a folder; tries again if a thread has put another file into it meanwhile."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _check_server(options: Options) -> None:
    """Refuses flags that the server could not start with, before the networks are loaded.

    Raises:
      UserError: a flag is out of range, or the server cannot listen on the address or port.
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
            raise UserError(f"--port {options.port}: is in use; choose another port") from None
        flag = "--port" if error.errno == errno.EACCES else "--host"
        value = getattr(options, flag[2:])
        raise UserError(
            f"{flag} {value}: the server cannot listen on it ({error.strerror}); choose another"
        ) from None


def _import_app() -> types.ModuleType:
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
