"""The house's rooms: every module lies in a package, and imports only from packages that its own may know."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "tsdsr_jax"
ROOT = "tsdsr_jax"
# Package -> the packages that it may import, besides the modules at the root.
MAY_IMPORT = {
    "models": (),
    "images": (),
    "weights": ("models",),
    "upscaling": ("models", "weights", "images"),
    "evaluation": ("models", "weights", "images"),
    "data": ("weights", "images"),
    "training": ("data", "models", "weights", "images"),
    "distillation": ("training", "data", "models", "weights", "images"),
    "pretraining": ("training", "data", "models", "weights", "images"),
    "commands": (
        "upscaling",
        "evaluation",
        "pretraining",
        "distillation",
        "training",
        "data",
        "models",
        "weights",
        "images",
    ),
}
AT_THE_ROOT = {
    "__init__",
    "atomic",
    "cli",
    "cli_help",
    "compile_watch",
    "devices",
    "errors",
    "exchange",
    "flags",
    "git_lfs",
    "hints",
    "identity",
    "launchers",
    "peers",
    "places",
    "program_cache",
    "storage",
}


class Import(NamedTuple):
    """`name` of module `source`, imported by module `reader`."""

    reader: str
    source: str
    name: str

    def __str__(self) -> str:
        return f"{self.reader} imports {self.name} of {self.source}"


def modules() -> dict[str, Path]:
    """`weights.bundled` -> its file."""
    files = sorted(LIBRARY.rglob("*.py"))
    return {".".join(file.relative_to(LIBRARY).with_suffix("").parts): file for file in files}


def imports(source: str, reader: str, known: set[str]) -> Iterator[Import]:
    """What a module's source imports from this library, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, "it") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{reader}: relative imports hide where a name comes from"
            names = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module != ROOT and not module.startswith(ROOT + "."):
                continue
            path = module.removeprefix(ROOT).removeprefix(".")
            whole = f"{path}.{name}".removeprefix(".")
            # `from tsdsr_jax.weights import bundled` imports a module.
            yield (
                Import(reader, whole, "the module")
                if whole in known
                else Import(reader, path or "__init__", name)
            )


def all_imports() -> list[Import]:
    known = modules()
    return [
        found for reader, file in known.items() for found in imports(file.read_text(), reader, set(known))
    ]


def package_of(module: str) -> str:
    return module.split(".")[0] if "." in module else ""


def wrong_arrows(found: list[Import]) -> list[str]:
    """The imports that the table forbids, in words."""
    wrong = []
    for one in found:
        # The public face imports lazily: see tests/upscaling/test_upscaler.py.
        if one.reader == "__init__":
            continue
        reader, source = package_of(one.reader), package_of(one.source)
        allowed = {"", reader, *MAY_IMPORT.get(reader, ())}
        if source not in allowed:
            wrong.append(f"{one}: {reader or 'the root'} must not know {source}")
    return wrong


def test_every_module_lies_in_a_package():
    at_the_root = {name for name in modules() if "." not in name}
    assert at_the_root == AT_THE_ROOT
    assert {package_of(name) for name in modules()} == {"", *MAY_IMPORT}


def test_packages_import_only_what_they_may_know():
    assert not wrong_arrows(all_imports()), "\n" + "\n".join(wrong_arrows(all_imports()))


@pytest.mark.parametrize(
    ("source", "reader", "words"),
    [
        ("from tsdsr_jax.training.loop import run", "data.photos", "data must not know training"),
        ("import tsdsr_jax.upscaling.app", "evaluation.measure", "evaluation must not know upscaling"),
        ("def f():\n    from tsdsr_jax.weights import bundled", "models.vae", "models must not know weights"),
        ("from tsdsr_jax.images.files import read_photo", "cli", "the root must not know images"),
    ],
)
def test_a_wrong_arrow_is_named(source, reader, words):
    (told,) = wrong_arrows(list(imports(source, reader, {"weights.bundled"})))
    assert words in told and reader in told


def test_nothing_private_is_imported_from_another_module():
    private = [str(one) for one in all_imports() if one.name.startswith("_")]
    assert not private


def test_modules_do_not_import_each_other_in_a_circle():
    arrows: dict[str, set[str]] = {}
    for one in all_imports():
        arrows.setdefault(one.reader, set()).add(one.source)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for source in sorted(arrows.get(module, ())):
                visit(source, (*above, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def public_names(source: str) -> Iterator[str]:
    """A module's public functions and classes, and the types that it gives a name."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[0].isupper() and not name.isupper():
                yield name


def test_no_two_public_things_share_a_name():
    """One name, one thing; but each command has a `main` and its `Options`."""
    owners: dict[str, list[str]] = {}
    for module, file in modules().items():
        for name in public_names(file.read_text()):
            if package_of(module) != "commands" or name not in ("main", "Options"):
                owners.setdefault(name, []).append(module)
    shared = {name: found for name, found in owners.items() if len(found) > 1}
    assert not shared, "\n" + "\n".join(f"{name}: {', '.join(found)}" for name, found in shared.items())


def test_packages_have_empty_init_files():
    assert not [file for file in LIBRARY.glob("*/__init__.py") if file.read_text().strip()]
