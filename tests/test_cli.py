"""Command lines: what is accepted, and that every mistake is one line that names the flag."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from tsdsr_jax import cli
from tsdsr_jax.errors import UserError


@dataclass(frozen=True)
class Options:
    pretrained_model_name_or_path: Path
    """Folder of the Stable Diffusion 3 checkpoint."""
    input_dir: Annotated[Path | None, tyro.conf.arg(aliases=["-i"])] = None
    """A photograph, or a folder of them."""
    align_method: Literal["wavelet", "adain", "nofix"] = "wavelet"
    """How colors are matched to the input."""
    is_use_tile: bool = False
    """Work in tiles."""
    progress: bool = True
    seed: int = 42
    max_steps: int | None = None
    guidance: float = 1.0
    name: str = "tsdsr"
    prompts: tuple[str, ...] = ("default",)
    scales: tuple[int, ...] = ()
    size: tuple[int, int] = (512, 512)
    resume: bool | None = None
    layers: tuple[int, ...] = field(default_factory=lambda: (1, 2))

    def __post_init__(self):
        if self.seed == 13:
            raise ValueError("seed 13 is unlucky")
        if self.seed == 14:
            raise UserError("seed 14: pick another")


@dataclass(frozen=True)
class Strict:
    """Nothing has a default."""

    tiled: bool
    method: Literal[1, 2]
    files: tuple[Path, ...]


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infer/upscale.py"])


def parse(*argv: str) -> Options:
    return cli.parse(Options, description="Upscale.", argv=["--pretrained_model_name_or_path", "sd3", *argv])


def complaint(capsys, *argv: str, options_class: type = Options, required: bool = True) -> str:
    """The one line that a bad command line prints, without the script's name."""
    model = ["--pretrained_model_name_or_path=sd3"] if required and options_class is Options else []
    with pytest.raises(SystemExit) as stopped:
        cli.parse(options_class, description="Upscale.", argv=[*model, *argv])
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.out == ""
    assert output.err.startswith("upscale.py: ") and output.err.count("\n") == 1, output.err
    return output.err.removeprefix("upscale.py: ").rstrip("\n")


def test_defaults():
    assert parse() == Options(Path("sd3"))


def test_argv_is_sys_argv_when_absent(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["upscale.py", "--pretrained-model-name-or-path", "x", "--seed", "3"])
    assert cli.parse(Options, description="Upscale.") == Options(Path("x"), seed=3)


@pytest.mark.parametrize(
    "argv",
    [
        ["--align_method", "adain"],
        ["--align-method", "adain"],
        ["--align_method=adain"],
        ["--align-method=adain"],
        ["--align_method", "nofix", "--align-method=adain"],
    ],
)
def test_spellings_and_last_value_counts(argv):
    assert parse(*argv).align_method == "adain"


@pytest.mark.parametrize(
    "argv", [["-i", "a b.png"], ["-i=a b.png"], ["--input_dir", "a b.png"], ["--input-dir=a b.png"]]
)
def test_alias_and_paths(argv):
    assert parse(*argv).input_dir == Path("a b.png")


@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "TRUE", "on"])
@pytest.mark.parametrize("flag", ["is_use_tile", "is-use-tile", "progress"])
def test_booleans_with_a_true_value(flag, value):
    name = flag.replace("-", "_")
    assert getattr(parse(f"--{flag}", value, "--seed", "1"), name) is True
    assert getattr(parse(f"--{flag}={value}"), name) is True


@pytest.mark.parametrize("value", ["false", "False", "0", "no", "off"])
@pytest.mark.parametrize("flag", ["is_use_tile", "progress"])
def test_booleans_with_a_false_value(flag, value):
    assert getattr(parse(f"--{flag}", value), flag) is False
    assert getattr(parse(f"--{flag}={value}", "--seed=1"), flag) is False


def test_bare_and_negated_booleans():
    assert parse("--is_use_tile", "--seed", "1").is_use_tile is True
    assert parse("--no_is_use_tile").is_use_tile is False
    assert parse("--no-progress").progress is False
    assert parse("--is_use_tile", "--no_is_use_tile").is_use_tile is False
    assert parse("--no_is_use_tile", "--is_use_tile", "yes").is_use_tile is True


def test_optional_boolean():
    assert parse().resume is None
    assert parse("--no_resume").resume is False
    assert parse("--resume").resume is True
    assert parse("--resume", "no").resume is False
    assert parse("--resume=None").resume is None


def test_required_fields_of_every_kind():
    options = cli.parse(
        Strict, description="", argv=["--tiled", "no", "--method", "2", "--files", "a", "-1.png"]
    )
    assert options == Strict(False, 2, (Path("a"), Path("-1.png")))


def test_optional_integer():
    assert parse("--max_steps", "7").max_steps == 7
    assert parse("--max_steps", "None").max_steps is None


def test_negative_numbers_are_values():
    options = parse("--seed", "-5", "--guidance", "-.5", "--size", "-1", "-2", "--scales", "-3", "4")
    assert (options.seed, options.guidance, options.size, options.scales) == (-5, -0.5, (-1, -2), (-3, 4))
    assert parse("--guidance", "-1e-3").guidance == -1e-3


def test_repeated_flags_replace_the_default():
    assert parse("--prompts", "a", "--prompts=b c").prompts == ("a", "b c")
    assert parse("--prompts", "a", "b", "--seed", "1").prompts == ("a", "b")
    assert parse("--layers=5").layers == (5,)


def test_values_that_look_like_flags():
    assert parse("--name=--seed").name == "--seed"
    assert parse("--name=-x=y").name == "-x=y"
    assert parse("--prompts=-a", "--prompts=--b").prompts == ("-a", "--b")
    assert parse("--input_dir", "-").input_dir == Path("-")
    assert parse("--name", "algin_method").name == "algin_method"
    assert parse("--name", "").name == ""


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [
        ("--algin_method", "--align_method"),
        ("--algin-method", "--align_method"),
        ("--align", "--align_method"),
        ("--Seed", "--seed"),
        ("-seed", "--seed"),
        ("-input_dir", "--input_dir"),
        ("--no_is_use_tiles", "--no_is_use_tile"),
        ("--no_input_dir", "--input_dir"),
    ],
)
def test_unknown_flag_with_a_suggestion(capsys, flag, suggestion):
    assert complaint(capsys, flag, "adain") == f"unknown flag {flag}; did you mean {suggestion}?"
    assert complaint(capsys, flag + "=adain") == f"unknown flag {flag}; did you mean {suggestion}?"


@pytest.mark.parametrize("flag", ["--frobnicate", "-x", "--", "--x"])
def test_unknown_flag_without_a_suggestion(capsys, flag):
    assert complaint(capsys, flag) == f"unknown flag {flag}; --help lists the flags"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--align_method", "wavlet"],
            "--align_method was given 'wavlet'; expected one of wavelet, adain or nofix",
        ),
        (["--seed", "abc"], "--seed was given 'abc'; expected an integer"),
        (["--seed=1.5"], "--seed was given '1.5'; expected an integer"),
        (["--max-steps", "many"], "--max_steps was given 'many'; expected an integer or None"),
        (["--guidance", "x"], "--guidance was given 'x'; expected a number"),
        (["--is_use_tile=maybe"], "--is_use_tile was given 'maybe'; expected true or false"),
        (["--is_use_tile=None"], "--is_use_tile was given 'None'; expected true or false"),
        (["--size", "1", "x"], "--size was given '1 x'; expected 2 values: an integer, an integer"),
        (
            ["--scales", "1", "--scales", "x"],
            "--scales was given '1 x'; expected one or more values, each an integer",
        ),
    ],
)
def test_bad_value(capsys, argv, message):
    assert complaint(capsys, *argv) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed"], "--seed needs an integer"),
        (["--size", "1"], "--size needs 2 values: an integer, an integer"),
        (
            ["-i", "--seed", "1"],
            "--input_dir needs a path or None; write --input_dir=--seed if --seed is its value",
        ),
        (
            ["-i", "-my photos"],
            "--input_dir needs a path or None; write '--input_dir=-my photos' if -my photos is its value",
        ),
        (["--prompts"], "--prompts needs one or more values, each a value"),
    ],
)
def test_missing_value(capsys, argv, message):
    assert complaint(capsys, *argv) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["photo.png"], "after --pretrained_model_name_or_path, which takes a path"),
        (["--is_use_tile", "maybe"], "after --is_use_tile, which takes true or false"),
        (["--seed", "1", "2"], "after --seed, which takes an integer"),
    ],
)
def test_stray_argument(capsys, argv, message):
    assert complaint(capsys, *argv) == f"unexpected argument '{argv[-1]}' {message}"


def test_negated_boolean_takes_no_value(capsys):
    assert complaint(capsys, "--no_progress=1") == "--no_progress takes no value; --progress does"


def test_missing_required(capsys):
    message = complaint(capsys, "--seed", "1", required=False)
    assert message == "--pretrained_model_name_or_path must be given; --help explains the flags"
    message = complaint(capsys, "--method=1", options_class=Strict)
    assert message == "--tiled and --files must be given; --help explains the flags"


def test_class_refuses_the_combination(capsys):
    assert complaint(capsys, "--seed", "13") == "seed 13 is unlucky"
    with pytest.raises(UserError, match="pick another"):
        parse("--seed", "14")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--seed", "1", "--help"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Options, description="Upscale photographs.", argv=argv)
    text = capsys.readouterr().out
    assert stopped.value.code in (0, None)
    assert "upscale.py" in text and "Upscale photographs." in text
    assert "Folder of the Stable Diffusion 3 checkpoint." in text
    assert "--align_method {wavelet,adain,nofix}" in text and "-i, --input_dir PATH" in text
    assert "--align-method" not in text


def run_script(body: str, **kwargs) -> subprocess.CompletedProcess:
    code = f"import sys\nfrom tsdsr_jax import cli\nsys.argv = ['infer/upscale.py']\n{body}"
    return subprocess.run([sys.executable, "-c", code], text=True, stderr=subprocess.PIPE, **kwargs)


def raising(error: BaseException):
    def main():
        raise error

    return main


def test_run_user_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(raising(UserError("photo.png: not an image")))
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "upscale.py: photo.png: not an image\n"


def test_run_interrupt(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(raising(KeyboardInterrupt()))
    assert stopped.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted\n"


def test_run_lets_bugs_and_exits_through():
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()))
    with pytest.raises(SystemExit, match="3"):
        cli.run(raising(SystemExit(3)))
    assert cli.run(lambda: "ignored") is None


def test_run_keeps_the_traceback_of_a_bug():
    result = run_script("cli.run(lambda: 1 / 0)")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes close differently elsewhere")
@pytest.mark.parametrize("length", [5, 1_000_000])
def test_run_closed_pipe_is_quiet(length):
    reader, writer = os.pipe()
    os.close(reader)
    result = run_script(f"cli.run(lambda: print('x' * {length}))", stdout=writer)
    os.close(writer)
    assert result.stderr == "" and result.returncode == 128 + signal.SIGPIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("length", [5, 1_000_000])
def test_run_names_a_full_disk(length):
    """A log file's disk, or any other."""
    with open("/dev/full", "w") as full:
        result = run_script(f"cli.run(lambda: print('x' * {length}))", stdout=full.fileno())
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "receives this command's output: the disk is full; make room" in result.stderr


def test_run_names_a_full_disk_by_its_file(capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.run(raising(OSError(errno.ENOSPC, "No space left on device", "logs/a")))
    assert capsys.readouterr().err == "upscale.py: logs/a: the disk is full; make room and run it again\n"
    with pytest.raises(PermissionError):
        cli.run(raising(PermissionError(errno.EACCES, "Permission denied", "logs/a")))


def test_run_names_a_current_folder_that_was_removed(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="1"):
        cli.run(lambda: None)
    assert "the current folder was removed" in capsys.readouterr().err


def test_a_link_to_a_disk_that_is_not_mounted_is_named(tmp_path):
    """Nothing could be written below it, which an hour's results would show one by one."""
    (tmp_path / "outputs").symlink_to(tmp_path / "disk" / "outputs")
    (tmp_path / "circle").symlink_to("circle")
    for folder in ("outputs", "outputs/below", "circle"):
        with pytest.raises(UserError, match=rf"--output_dir .*{folder}: .* is a link that leads nowhere"):
            cli.check_writable(tmp_path / folder)
    (tmp_path / "disk" / "outputs").mkdir(parents=True)
    cli.check_writable(tmp_path / "outputs" / "below")
