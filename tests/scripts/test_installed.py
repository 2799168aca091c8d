"""The package as pip installs it: built as a wheel, unpacked, and used where there is no checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import tiny_checkpoint as tiny
from tsdsr_jax.commands import entry
from tsdsr_jax.places import CHECKOUT, SOURCE_CODE

SCRIPTS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its commands, as `pip install` of this checkout's wheel makes them."""
    root = tmp_path_factory.mktemp("installed")
    source = root / "source"
    # A copy of what is committed or would be: setuptools leaves an egg-info folder where it builds.
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=CHECKOUT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, files.split("\0")):
        if (CHECKOUT / name).is_file() and not name.startswith(("tests/", "bench/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((CHECKOUT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", root / "wheel", source], check=True)
    assert not (source / "build").exists()
    (wheel,) = (root / "wheel").iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", root / "site", wheel], check=True)
    return root / "site"


def run(installed: Path, folder: Path, command: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """An installed command, in a folder outside any checkout; dependencies are those of the tests."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, installed / "bin" / command, *flags],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_a_photograph_is_upscaled_with_the_bundled_model(installed: Path, tmp_path: Path):
    Image.fromarray(tiny.synthetic_photo(24, 20, 0)).save(tmp_path / "photo.jpg")
    result = run(installed, tmp_path, "tsdsr-upscale", "-i", "photo.jpg", "-o", "out", "--process_size", "64")
    assert result.returncode == 0, result.stderr
    assert str(installed) in result.stdout  # the model's folder
    (made,) = (tmp_path / "out").iterdir()
    assert Image.open(made).size == (80, 96)


def test_scripts_of_the_checkout_run_with_the_installed_package(installed: Path, tmp_path: Path):
    """As after `pip install .`: both have the bundled model, and the pages name the checkout's."""
    Image.fromarray(tiny.synthetic_photo(24, 20, 0)).save(tmp_path / "photo.jpg")
    checkout = installed.parent / "source"
    result = subprocess.run(
        [sys.executable, "infer/upscale.py", tmp_path / "photo.jpg", "--pretrained_model_name_or_path", "weights/tiny",
         "--process_size", "64", "-o", tmp_path / "large.png"],
        cwd=checkout, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "large.png").size == (80, 96)


@pytest.mark.parametrize("command", ["tsdsr-distill", "tsdsr-convert-sd3"])
def test_commands_explain_themselves(installed: Path, tmp_path: Path, command: str):
    result = run(installed, tmp_path, command, "--help")
    assert result.returncode == 0, result.stderr
    assert command in result.stdout


def test_every_command_has_its_door_and_its_script(installed: Path):
    """One function, one module with a `main` and one script in the checkout each."""
    assert {path.name for path in (installed / "bin").iterdir()} == set(SCRIPTS)
    for command, target in SCRIPTS.items():
        module, _, name = target.partition(":")
        assert module == entry.__name__ and callable(getattr(entry, name))
        assert command == f"tsdsr-{name.replace('_', '-')}"
        assert "def main(" in (CHECKOUT / "tsdsr_jax" / "commands" / f"{name}.py").read_text()
    doors = [file for folder in ("convert", "train", "infer") for file in (CHECKOUT / folder).glob("*.py")]
    called = [re.search(r"entry\.(\w+)\(\)", file.read_text())[1] for file in doors]
    assert sorted(called) == sorted(target.partition(":")[2] for target in SCRIPTS.values())


def test_our_code_is_the_package_not_all_that_is_installed(installed: Path):
    """What `--log_code` sends."""
    said = subprocess.run(
        [sys.executable, "-c", "from tsdsr_jax import places; print(places.SOURCE_CODE)"],
        cwd=installed.parent, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == str(installed / "tsdsr_jax")
    assert SOURCE_CODE == CHECKOUT


def test_only_our_package_is_installed(installed: Path):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"tsdsr_jax", "bin"}
    assert (installed / "tsdsr_jax" / "evaluation" / "report_page" / "page.html").is_file()
