"""README and docs/: every command line and snippet runs as printed, every link leads somewhere, every module is named."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
import shlex
import signal
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from test_architecture import MAY_IMPORT

import docs_clone
from commands import Command
from docs_pages import PAGES, Snippet, anchors, links, prose, quoted, read, snippets
from tsdsr_jax.places import CHECKOUT
from tsdsr_jax.training import session

pytestmark = pytest.mark.usefixtures("quick_compilation")

INSTALLED = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]

# How a command begins that is not run here -> why, and what runs it instead.
NOT_RUN = {
    "git clone": "needs a network",
    "pip install": "needs a network; tests/scripts/test_installed.py installs the package",
    "make demo": "makes an environment; tests/scripts/test_demo.py runs its script",
    "make test": "runs this test",
    "python -m pytest": "runs tests, which run anyway",
    "python infer/app.py": "serves until it is stopped; tests/upscaling/test_app.py drives it",
    "python convert/prompts.py --default": "needs SD3's text encoders; tests/weights/test_prompts.py has tiny ones",
    "python convert/prompts.py --prompt": "the same",
    "python convert/lpips.py": "needs torchvision's AlexNet; tests/models/test_lpips.py has a random one",
    "srun": "needs SLURM and several machines",
    "python train/distill.py --pretrained_model_name_or_path s3:": "needs a store; tests/test_storage.py has one",
    "python infer/upscale.py --pretrained_model_name_or_path s3:": "the same",
    "sbatch cluster/slurm.sh": "needs SLURM; tests/clusters/test_slurm.py runs it under a real one",
    "torchrun": "needs PyTorch and several GPUs; tests/test_launchers.py has its variables",
    "python train/distill.py --coordinator_address": "needs two machines; test_distill_processes.py has two processes",
    "train/recipes/tiny.sh": "takes hours; tests/scripts/test_recipe.py runs it at its smallest",
    "python bench/inference.py": "needs PyTorch; tests/scripts/test_benchmarks.py runs it at its smallest",
}

# Added to what the page says, so that it takes seconds: later flags win.
SMALL_RUN = "--max_train_steps 1 --lr_warmup_steps 0 --crop_size 32 --num_validation_images 1 --validation_steps 1000000"
ADDED = {
    "train/distill.py": SMALL_RUN,
    "train/teacher.py": f"{SMALL_RUN} --sampling_steps 1",
    "train/autoencoder.py": SMALL_RUN,
    "train/prepare.py": "--crop_size 32 --dataloader_num_workers 0",
    "infer/upscale.py": "--process_size 64",
}


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """The script that a command line means, by its path in the checkout, and its flags."""
    if words[0] == "python":
        return words[1], words[2:]
    name = INSTALLED[words[0]].partition(":")[2]
    doors = {
        file: file.read_text()
        for folder in ("convert", "infer", "train")
        for file in (CHECKOUT / folder).glob("*.py")
    }
    (door,) = [file for file, text in doors.items() if f"entry.{name}()" in text]
    return door.relative_to(CHECKOUT).as_posix(), words[1:]


def not_run(snippet: Snippet) -> list[str]:
    return [start for start in NOT_RUN if snippet.text.startswith(start)]


def outputs(page: str) -> set[str]:
    """First folders of what a page's commands write."""
    found: set[str] = set()
    for snippet in snippets(page):
        if snippet.language == "bash" and not not_run(snippet):
            found |= set(re.findall(r"(?:--output|--output_dir|-o) ([^\s/]+)(?=\s|$)", snippet.text))
    return found


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("brought")
    docs_clone.bring(root)
    return root


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a reader's machine, instead of the tests' eight; signal handlers of training are taken back."""
    for name in ("devices", "local_devices"):
        several = getattr(jax, name)
        monkeypatch.setattr(jax, name, lambda *args, several=several, **more: several(*args, **more)[:1])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def reader(brought, tmp_path, monkeypatch, capsys, one_device) -> Reader:
    return Reader(brought, tmp_path / "clone", monkeypatch, capsys)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_runs(page, reader, monkeypatch):
    """In order, in one working folder: later commands may use what earlier ones made.

    Training has opened its data and loaded its networks when it ends here, before a step is compiled.
    """
    monkeypatch.setattr(session, "train", lambda *loaded: None)
    reader.stands_in = docs_clone.bring_trained
    reader.obey(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "python train/" in read(page)])
def test_training_runs_to_its_end(page, reader):
    """All of a page again, with training of one step. 2026-11-28: passed, in some 300 s of CPU."""
    reader.obey(page)


class Reader:
    """Does what a page says, in a fresh clone.

    Attributes:
      stands_in: leaves a script's LoRAs in a folder for a model, in place of a training that has not been computed.
    """

    stands_in: Callable[[str, Path, Path], None] | None = None

    def __init__(
        self, brought: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ):
        self.brought, self.root, self.monkeypatch, self.capsys = brought, root, monkeypatch, capsys

    def obey(self, page: str) -> None:
        docs_clone.clone(self.root, self.brought, outputs(page))
        self.monkeypatch.chdir(self.root)
        names: dict[str, object] = {}
        for snippet in snippets(page):
            if snippet.language == "python":
                exec(compile("\n" * (snippet.line - 1) + snippet.text, page, "exec"), names)
            elif not not_run(snippet):
                self.type(snippet)

    def type(self, snippet: Snippet) -> None:
        script, flags = script_of(shlex.split(snippet.text))
        assert (CHECKOUT / script).is_file(), snippet
        name = script.removesuffix(".py").replace("convert/", "convert_").rpartition("/")[2]
        command = Command(
            importlib.import_module(f"tsdsr_jax.commands.{name}").main,
            script,
            self.root,
            self.monkeypatch,
            self.capsys,
        )
        added = ADDED.get(script, "").split()
        if "--crop_size" in added and "--crop_size" in flags:  # two values would be a height and a width
            where = flags.index("--crop_size")
            flags = flags[:where] + flags[where + 2 :]
        outcome = command.typed(script, *flags, *added)
        assert outcome.status == 0, (str(snippet), outcome)
        if "--max_train_steps" in flags:
            self.leave_last_checkpoint(script, dict(itertools.pairwise(flags)))

    def leave_last_checkpoint(self, script: str, flags: dict[str, str]) -> None:
        """Under the name that it has after as many steps as the page says."""
        checkpoint = self.root / flags["--output_dir"] / f"checkpoint_{int(flags['--max_train_steps']):07d}"
        if self.stands_in is None:
            checkpoint.symlink_to("checkpoint_0000001")
        elif "--pretrained_model_name_or_path" in flags:
            self.stands_in(script, checkpoint / "lora", self.root / flags["--pretrained_model_name_or_path"])


def test_the_list_of_what_is_not_run_is_exact():
    """Each entry is on some page, and no command has two."""
    commands = [snippet for page in PAGES for snippet in snippets(page) if snippet.language == "bash"]
    assert {start for snippet in commands for start in not_run(snippet)} == set(NOT_RUN)
    assert all(len(not_run(snippet)) <= 1 for snippet in commands)
    used = {script_of(shlex.split(snippet.text))[0] for snippet in commands if not not_run(snippet)}
    assert set(ADDED) <= used


def test_the_readme_is_short_and_names_every_command():
    text = read("README.md")
    assert text.count("\n") <= 150
    assert set(re.findall(r"\btsdsr-[\w-]+", text)) == set(INSTALLED)


OTHERS = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "weights/tiny/README.md",
    "examples/photos/SOURCES.md",
    "bench/RESULTS.md",
)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (CHECKOUT / page).parent / target if target else CHECKOUT / page
        assert file.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(CHECKOUT).as_posix()), f"{page}: {link}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_quoted_files_are_there(page):
    folders = "bench|convert|docs|examples|infer|tests|train|tsdsr_jax"
    files = [word for word in quoted(page) if re.fullmatch(rf"({folders})/[\w./]+\.\w+", word)]
    assert not [file for file in files if not (CHECKOUT / file).exists()]


def test_quoted_flags_exist():
    known = {"--help"}
    for door in INSTALLED.values():
        options = importlib.import_module(f"tsdsr_jax.commands.{door.partition(':')[2]}").Options
        known |= {f"--{no}{field.name}" for field in dataclasses.fields(options) for no in ("", "no_")}
    recipe = (CHECKOUT / "train/recipes/tiny.sh").read_text()
    known |= {f"--{name}" for name in re.findall(r"^    --(\w+)\)", recipe, re.MULTILINE)}
    for page in PAGES:
        flags = {flag for word in quoted(page) for flag in re.findall(r"(?<!\S)--\w+", word)}
        assert flags <= known, f"{page}: {sorted(flags - known)}"


def test_the_architecture_names_every_module_and_arrow():
    text = read("docs/architecture.md").partition("## Modules\n")[2]
    named = set()
    for section in text.split("\n### ")[1:]:
        package, _, table = section.partition("\n")
        modules = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
        assert len(modules) == len(set(modules)), package
        named |= {name if package == "The root" else f"{package}/{name}" for name in modules}
    library = CHECKOUT / "tsdsr_jax"
    files = [file.relative_to(library) for file in library.rglob("*.py")]
    modules = {file.with_suffix("").as_posix() for file in files if file.name != "__init__.py"}
    assert named == modules | {"__init__"}, named ^ (modules | {"__init__"})

    rows = re.findall(r"^\| \[`(\w+)/`\].*\| ([^|]+) \|$", prose("docs/architecture.md"), re.MULTILINE)
    allowed = {package: set(re.findall(r"`(\w+)/`", cell)) for package, cell in rows}
    allowed["commands"] = set(MAY_IMPORT) - {"commands"}  # "all of them"
    assert allowed == {package: set(others) for package, others in MAY_IMPORT.items()}
