"""Where computations run, what is kept of them, and how much memory there is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from tsdsr_jax import devices
from tsdsr_jax.commands import entry
from tsdsr_jax.devices import memory_of

CODE = """
import json, jax
from tsdsr_jax.devices import keep_programs
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


def test_what_compiles_in_a_tenth_of_a_second_is_kept_too(monkeypatch):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 3)
        devices.keep_programs()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 3
        monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        devices.keep_programs()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


OPTIONS = """
import json
from jax._src.compiler import get_compile_options
from tsdsr_jax.devices import keep_programs
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


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "tsdsr_jax").write_text("in the way")
    assert told(tmp_path) is None


def test_a_user_without_a_home_keeps_nothing():
    """As in a container that does not know the user: Path.home() raises."""
    assert (
        told("", before="import pathlib\ndef none(): raise RuntimeError('no home')\npathlib.Path.home = none")
        is None
    )


def test_memory_is_told_or_half_of_the_machines():
    class Device:
        def __init__(self, stats: dict | None):
            self.memory_stats = lambda: stats

    assert memory_of(Device({"bytes_limit": 7})) == 7
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert 0 < memory_of(Device(None)) == memory_of(Device({})) <= half


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"XLA_CLIENT_MEM_FRACTION": "0.5"},
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    ],
    ids=str,
)
def test_commands_reserve_more_of_a_gpu_unless_told(monkeypatch, chosen):
    environment = dict(chosen)
    seen: list[dict[str, str]] = []
    command = SimpleNamespace(main=None, run=lambda main: seen.append(dict(environment)))
    monkeypatch.setattr(entry.os, "environ", environment)
    monkeypatch.setattr(entry.importlib, "import_module", lambda name: command)
    monkeypatch.setattr(entry.signal, "signal", lambda *_: None)
    entry.upscale()
    assert seen == [chosen or {"XLA_CLIENT_MEM_FRACTION": "0.92"}]
