"""Compiled programs on disk: which folder keeps them, and what happens to broken files in it."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import pytest
from filelock import FileLock

from tsdsr_jax import program_cache
from tsdsr_jax.program_cache import keep_programs, remove_broken, size_limit, usable_folder

CODE = """
import json, jax
from tsdsr_jax.program_cache import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
print(json.dumps(jax.config.jax_compilation_cache_dir))
"""


def told(home: Path | str, before: str = "", code: str = CODE, **variables: str) -> Any:
    """The folder that a fresh process keeps its programs in, or what other code prints."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment = kept | {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-c", before + code], env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_programs_are_kept_in_the_users_cache(tmp_path):
    folder = told(tmp_path)
    assert Path(folder).parent == tmp_path / "tsdsr_jax" and any(Path(folder).iterdir())
    assert told(tmp_path) == folder


def test_jax_own_variables_come_first(tmp_path):
    assert told(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert any((tmp_path / "mine").iterdir()) and not (tmp_path / "tsdsr_jax").exists()

    told(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "tsdsr_jax").exists()


def test_a_folder_of_the_users_choice_that_cannot_be_used_costs_one_line(tmp_path):
    """JAX would warn about every program."""
    (tmp_path / "file").touch()
    named = tmp_path / "file" / "below"
    code = """
import json, warnings
warnings.simplefilter("error")
import jax
from tsdsr_jax.program_cache import keep_programs
said = []
keep_programs(said.append)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2 + 1)(1.0).block_until_ready()
print(json.dumps(said))
"""
    said = told(tmp_path, code=code, JAX_COMPILATION_CACHE_DIR=str(named))
    assert said == [
        f"JAX_COMPILATION_CACHE_DIR {named}: compiled programs cannot be kept there (Not a directory)"
    ]


def test_what_compiles_in_a_tenth_of_a_second_is_kept_too(monkeypatch):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 3)
        keep_programs()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 3
        monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        keep_programs()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


OPTIONS = """
import json
from jax._src.compiler import get_compile_options
from tsdsr_jax.program_cache import keep_programs
keep_programs()
made = get_compile_options(1, 1)  # owns what follows
options = made.executable_build_options.debug_options
print(json.dumps([options.xla_gpu_per_fusion_autotune_cache_dir, options.xla_gpu_kernel_cache_file]))
"""


def test_a_gpus_measurements_are_kept_beside_the_programs(tmp_path):
    folder = told(tmp_path)
    assert sorted(path.name for path in Path(folder).iterdir() if path.is_dir()) == []  # none on a CPU
    assert told(tmp_path, code=OPTIONS) == [f"{folder}/xla_gpu_per_fusion_autotune_cache_dir", ""]
    mine = {"JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}
    assert told(tmp_path, code=OPTIONS, **mine) == ["", ""]


@pytest.fixture
def said() -> list[str]:
    return []


def test_without_the_users_cache_programs_are_kept_in_a_temporary_folder(tmp_path, monkeypatch, said):
    (tmp_path / "tsdsr_jax").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program_cache.tempfile, "tempdir", str(tmp_path))
    folder = usable_folder(said.append)
    own = tmp_path / f"tsdsr_jax-{os.getuid()}"
    assert folder.parent == own and own.stat().st_mode & 0o777 == 0o700
    assert len(said) == 1 and str(folder) in said[0] and "File exists" in said[0]

    # Whoever can write there could make this user run a program.
    own.chmod(0o777)
    said.clear()
    assert usable_folder(said.append) is None
    assert len(said) == 1 and "every run compiles them again" in said[0]
    assert "others can write" in said[0] and "JAX_COMPILATION_CACHE_DIR" in said[0]


def test_a_user_without_a_home_has_a_temporary_folder(tmp_path, monkeypatch, said):
    """As in a container that does not know the user: Path.home() raises."""

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(program_cache.Path, "home", no_home)
    monkeypatch.setattr(program_cache.tempfile, "tempdir", str(tmp_path))
    assert usable_folder(said.append).parent == tmp_path / f"tsdsr_jax-{os.getuid()}"


@pytest.mark.parametrize("reason", ["No space left on device", "Permission denied"])
def test_a_full_or_protected_disk_is_noticed_before_jax_warns_about_each_program(
    tmp_path, monkeypatch, reason, said
):
    def refuse(**_where):
        raise OSError(28, reason)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(program_cache.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(program_cache.tempfile, "tempdir", str(tmp_path))
    assert usable_folder(said.append) is None and said[0].count(reason) == 2 and len(said) == 1


def test_a_lock_that_cannot_be_taken_is_noticed(tmp_path, monkeypatch, said):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(program_cache.tempfile, "tempdir", str(tmp_path))
    usual = usable_folder(said.append)
    (usual / ".lockfile").unlink()
    (usual / ".lockfile").mkdir()
    assert usable_folder(said.append).parent.parent == tmp_path and len(said) == 1
    # One that another process holds is no reason.
    (usual / ".lockfile").rmdir()
    with FileLock(usual / ".lockfile"):
        assert usable_folder(said.append) == usual


# --- broken entries -----------------------------------------------------------------------------------

WHOLE = zlib.compress(b"four and more bytes")


def stored(folder: Path, name: str, content: bytes = WHOLE, timed: bool = True) -> Path:
    """A program as JAX stores it; without its time if `timed` is false."""
    entry = folder / f"jit_{name}-{'0a' * 32}-cache"
    entry.write_bytes(content)
    if timed:
        program_cache._time_of(entry).write_bytes(bytes(8))
    return entry


def test_broken_programs_are_removed_and_whole_ones_get_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(program_cache, "_decompressor", lambda: zlib.decompress)
    whole, untimed = stored(tmp_path, "whole"), stored(tmp_path, "untimed", timed=False)
    cut, empty = stored(tmp_path, "cut", WHOLE[:-3]), stored(tmp_path, "empty", b"")
    cut_and_untimed = stored(tmp_path, "both", WHOLE[:9], timed=False)
    others = [tmp_path / name for name in ("notes.txt", "foreign-cache", "foreign-atime", "xla/x-cache")]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"")
    remove_broken(tmp_path)
    assert whole.read_bytes() == untimed.read_bytes() == WHOLE
    times = [program_cache._time_of(entry) for entry in (whole, untimed)]
    assert times[0].read_bytes() == bytes(8) and int.from_bytes(times[1].read_bytes(), "little") > 10**18
    for entry in (cut, empty, cut_and_untimed):
        assert not entry.exists() and not program_cache._time_of(entry).exists()
    assert all(other.exists() for other in others)


def test_later_starts_read_only_programs_that_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(program_cache, "_decompressor", lambda: zlib.decompress)
    stored(tmp_path, "whole")
    remove_broken(tmp_path)
    read: list[str] = []
    readable = program_cache._is_readable
    monkeypatch.setattr(
        program_cache, "_is_readable", lambda entry: read.append(entry.name) or readable(entry)
    )
    remove_broken(tmp_path)
    assert not read
    cut = stored(tmp_path, "cut")
    cut.write_bytes(WHOLE[:5])
    os.utime(cut, ns=(1, program_cache._time_of(cut).stat().st_mtime_ns + 1))
    remove_broken(tmp_path)
    assert set(read) == {cut.name} and not cut.exists()
    # A month later all are read again.
    checked = tmp_path / ".tsdsr_jax_checked"
    os.utime(checked, (1, 1))
    read.clear()
    remove_broken(tmp_path)
    assert len(read) == 1 and checked.stat().st_mtime > 1


def test_while_another_process_stores_programs_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(program_cache, "_decompressor", lambda: zlib.decompress)
    cut = stored(tmp_path, "cut", WHOLE[:5])
    with FileLock(tmp_path / ".lockfile"):
        remove_broken(tmp_path)
    assert cut.exists()
    remove_broken(tmp_path)
    assert not cut.exists()


def test_another_programs_file_costs_the_limit_and_one_line(tmp_path, said):
    stored(tmp_path, "whole")
    assert size_limit(tmp_path, said.append) == program_cache.PROGRAMS_BYTES and not said
    (tmp_path / "foreign-cache").touch()
    assert size_limit(tmp_path, said.append) == -1 and len(said) == 1 and "foreign-cache" in said[0]


def test_jax_keeps_programs_again_after_a_cut(tmp_path):
    """With JAX's own files: it stores nothing without the times, and never replaces what is cut."""
    folder = Path(told(tmp_path))
    entries = sorted(folder.glob("*-cache"))
    entries[0].write_bytes(entries[0].read_bytes()[:50])
    stored(folder, "orphan", b"", timed=False)
    before = "import warnings\nwarnings.simplefilter('error')\n"
    assert told(tmp_path, before) == str(folder)
    assert sorted(folder.glob("*-cache")) == entries
    assert all(zlib.decompress(entry.read_bytes()) for entry in entries)
