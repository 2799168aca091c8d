"""What processes tell each other. Threads with a barrier stand in for processes."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny_checkpoint as tiny
from tsdsr_jax import exchange
from tsdsr_jax.data import sizes, sources
from tsdsr_jax.data.photos import CropConfig
from tsdsr_jax.errors import UserError


class Processes:
    """Runs a function once per process; `exchange` works between them."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch):
        self.count, self._here, self._said = count, threading.local(), dict[int, str]()
        self._barrier = threading.Barrier(count, timeout=20)
        monkeypatch.setattr(exchange, "_count", lambda: count)
        monkeypatch.setattr(exchange, "_index", lambda: self._here.index)
        for module in (exchange, sources):
            monkeypatch.setattr(module, "of_everyone", self.of_everyone)

    @property
    def index(self) -> int | None:
        return getattr(self._here, "index", None)

    def of_everyone(self, value: Any) -> list[Any]:
        self._said[self._here.index] = json.dumps(value)
        self._barrier.wait()
        found = [json.loads(self._said[index]) for index in range(self.count)]
        self._barrier.wait()
        return found

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def one(index: int) -> Any:
            self._here.index = index
            return function(index)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_items_are_worked_on_once_and_come_back_in_order(monkeypatch, count):
    processes = Processes(count, monkeypatch)
    worked: list[int] = []

    def squares(items: list[int]) -> list[int]:
        worked.extend(items)
        return [item * item for item in items]

    found = processes.run(lambda _: exchange.shared_out(list(range(7)), squares))
    assert found == [[0, 1, 4, 9, 16, 25, 36]] * count and sorted(worked) == list(range(7))
    assert processes.run(lambda index: exchange.from_first(lambda: index * 10)) == [0] * count


def test_alone_nothing_is_sent():
    value = object()
    assert exchange.of_everyone(value) == [value] and exchange.from_first(lambda: value) is value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(10):
        Image.fromarray(tiny.synthetic_photo(40 + index, 48, index)).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


CROP = CropConfig(32, 32, 24)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The photographs whose headers are read."""
    paths: list[str] = []
    read = sizes.read_size

    def reading(path: Path, most: int) -> tuple[int, int]:
        paths.append(path.name)
        return read(path, most)

    monkeypatch.setattr(sizes, "read_size", reading)
    return paths


def look(root: Path) -> sources.Survey:
    return sources.look_at([root], CROP, lambda line: None)


def test_each_photograph_is_opened_by_one_process(folder, opened, monkeypatch):
    alone = look(folder)
    assert len(alone.photographs) == 10 and len(alone.unreadable) == 1
    opened.clear()
    assert Processes(4, monkeypatch).run(lambda _: look(folder)) == [alone] * 4
    assert sorted(opened) == sorted(path.name for path in folder.glob("*.png"))


def test_large_folders_keep_their_sizes(folder, opened, monkeypatch):
    alone = look(folder)
    assert not (folder / sizes.KEPT_FILE).exists()
    monkeypatch.setattr(sizes, "WORTH_KEEPING", 10)
    assert look(folder) == alone and (folder / sizes.KEPT_FILE).is_file()
    opened.clear()
    assert look(folder) == alone and opened == ["broken.png"]
    # A photograph that has changed is read again, and so is one that is new.
    Image.fromarray(tiny.synthetic_photo(64, 80, 3)).save(folder / "3.png")
    Image.fromarray(tiny.synthetic_photo(50, 60, 3)).save(folder / "new.png")
    opened.clear()
    found = {photo.name: (photo.height, photo.width) for photo in look(folder).photographs}
    assert found["3.png"] == (64, 80) and found["new.png"] == (50, 60) and len(found) == 11
    assert sorted(opened) == ["3.png", "broken.png", "new.png"]
    opened.clear()
    look(folder)
    assert opened == ["broken.png"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"0.png": [1]}', '{"0.png": 5}', '{"0.png": [9, 9, 1, 1]}', "\xff"]
)
def test_damaged_or_outdated_sizes_do_not_count(folder, content):
    alone = look(folder)
    (folder / sizes.KEPT_FILE).write_text(content)
    assert look(folder) == alone


def test_sizes_that_cannot_be_kept_are_no_error(folder, opened, monkeypatch):
    monkeypatch.setattr(sizes, "WORTH_KEEPING", 10)
    (folder / sizes.KEPT_FILE).mkdir()
    assert len(look(folder).photographs) == 10


def test_processes_with_other_photographs_are_refused(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    for path in list(folder.glob("*.png"))[:-1]:
        (other / path.name).write_bytes(path.read_bytes())

    def refused(index: int) -> str:
        with pytest.raises(UserError) as caught:
            look(other if index == 1 else folder)
        return str(caught.value)

    said = Processes(3, monkeypatch).run(refused)
    words = "the processes find different photographs (11 in process 0, 10 in process 1, 11 in process 2)"
    assert all(words in line for line in said)
