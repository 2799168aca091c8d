"""Ends of processes that train together; test_distill_processes.py ends real ones."""

from __future__ import annotations

import threading

import pytest

from tsdsr_jax import cli, peers
from tsdsr_jax.errors import UserError
from tsdsr_jax.peers import PEER_ENDED, Peers


class Store:
    """A key-value store in this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.closed = False

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite and value
        if self.closed:
            raise RuntimeError("UNAVAILABLE: Socket closed\nmore")
        self.values[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        if self.closed:
            raise RuntimeError("UNAVAILABLE: Socket closed\nmore")
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]


class Member(Peers):
    """A process of three that notes how it would end."""

    def __init__(self, store: Store, index: int, timeout: float = 10):
        self.statuses: list[int] = []
        self.lines: list[str] = []
        self.over = threading.Event()
        super().__init__(store, index, 3, timeout, self._note, self.lines.append)

    def _note(self, status: int) -> None:
        self.statuses.append(status)
        self.over.set()
        self._left.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(peers, "_INTERVAL", 0.01)
    monkeypatch.setattr(peers, "_GRACE", 0.05)
    monkeypatch.setattr(peers, "_READING", 0.3)


def test_a_count_that_stands_still_is_noticed_once_it_is_late():
    store = Store()
    first, second, third = (Member(store, index) for index in range(3))
    for member in (first, second, third):
        member._beat()
    assert first.gone(100.0) == ""
    second._beat()
    assert first.gone(109.0) == ""
    assert first.gone(111.0) == f"process 2 on {third._host} has not answered for 11 s"
    third._beat()
    assert first.gone(112.0) == ""
    third.leave()  # it ended as it should
    second._beat()
    assert first.gone(200.0) == ""


def test_a_failure_is_told_and_ends_the_others_with_a_status_of_their_own():
    store = Store()
    members = [Member(store, index) for index in range(3)]
    for member in members[1:]:
        member.start()
    members[0]._beat()
    members[0].fail(1, "photos/a.png: the disk is full\nin detail")
    assert members[0].statuses == [1] and not members[0].lines
    for member in members[1:]:
        assert member.over.wait(5) and member.statuses == [PEER_ENDED]
        host = member._host
        assert member.lines == [
            f"stopping process {member.index} on {host}: process 0 on {host} has ended: photos/a.png: the disk is full"
        ]


def test_who_fails_too_keeps_its_own_status(monkeypatch):
    """As with a bad step, which every process sees."""
    monkeypatch.setattr(peers, "_GRACE", 5.0)
    store = Store()
    members = [Member(store, index) for index in range(3)]
    members[1].start()
    members[0].fail(1, "bad")
    members[1].fail(1, "bad")
    assert members[1].statuses == [1] and members[1].lines == []


def test_a_store_that_is_gone_means_process_0():
    store = Store()
    first, second = Member(store, 0), Member(store, 1)
    first._beat()
    second.start()
    while 0 not in second._hosts:
        pass
    store.closed = True
    assert second.over.wait(5) and second.statuses == [PEER_ENDED]
    assert second.lines[0].endswith(
        f"process 0 on {first._host} cannot be reached (UNAVAILABLE: Socket closed)"
    )


def test_alone_nothing_is_told():
    peers.ended(1, "a reason")
    assert not peers.has_peers()


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (SystemExit(0), []),
        (SystemExit(None), []),
        (SystemExit(143), []),
        (SystemExit(1), [(1, "it ended with status 1")]),
        (SystemExit("a message"), [(1, "it ended with status a message")]),
        (UserError("photos: not there"), [(1, "photos: not there")]),
        (KeyboardInterrupt(), [(130, "interrupted")]),
    ],
)
def test_only_what_is_at_fault_ends_the_others(monkeypatch, end, told):
    failed, left = [], []

    class Watched:
        fail = staticmethod(lambda *reason: failed.append(reason))
        leave = staticmethod(lambda: left.append(True))

    monkeypatch.setattr(peers, "_joined", Watched)

    def main():
        raise end

    with pytest.raises(SystemExit):
        cli.run(main)
    assert failed == told and bool(left) == (not told)
