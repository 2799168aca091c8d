"""Adds the bundled model and the example photographs, which are outside the package, to what is installed."""

import atexit
import shutil
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# Folder in a checkout -> folder in an installed tsdsr_jax; tsdsr_jax/places.py looks in both.
COPIED = {"weights/tiny": "bundled/tiny", "examples/photos": "bundled/photos"}


class BuildWithModel(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in COPIED.items():
                folder = Path(self.build_lib) / "tsdsr_jax" / target
                shutil.copytree(Path(__file__).parent / source, folder, dirs_exist_ok=True)


# Not in the checkout, where a later wheel would take modules from it that exist no longer.
build = tempfile.mkdtemp(prefix="tsdsr_jax-build-")
atexit.register(shutil.rmtree, build, ignore_errors=True)
setup(cmdclass={"build_py": BuildWithModel}, options={"build": {"build_base": build}})
