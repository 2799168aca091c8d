"""Finds the repository's other files: in the checkout, or in the installed package, where `setup.py` puts them."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
CHECKOUT = _PACKAGE.parent
_INSTALLED = _PACKAGE / "bundled"
# Not the folder around an installed package, which holds everybody else's.
SOURCE_CODE = CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else _PACKAGE


def shipped(installed: str, checkout: str) -> Path:
    """Returns a folder shipped with the package: below `bundled/` if installed, otherwise below the checkout."""
    folder = _INSTALLED / installed
    return folder if folder.is_dir() else CHECKOUT / checkout
