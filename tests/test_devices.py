"""Where computations run, what is kept of them, and how much memory there is."""

import os
from types import SimpleNamespace

import pytest

from tsdsr_jax.commands import entry
from tsdsr_jax.devices import memory_of


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
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    assert seen == [(chosen or {"XLA_CLIENT_MEM_FRACTION": "0.92"}) | quiet]


def test_alarms_of_xla_are_shown_to_who_asks_for_them(monkeypatch):
    monkeypatch.setattr(entry.os, "environ", environment := {"TF_CPP_MIN_LOG_LEVEL": "0"})
    monkeypatch.setattr(
        entry.importlib, "import_module", lambda name: SimpleNamespace(main=None, run=lambda main: None)
    )
    monkeypatch.setattr(entry.signal, "signal", lambda *_: None)
    entry.upscale()
    assert environment["TF_CPP_MIN_LOG_LEVEL"] == "0"
