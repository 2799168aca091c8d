"""What is said while XLA compiles. The events are recorded here as JAX records them; one test compiles."""

import threading
import time

import jax
import jax.monitoring
import pytest

from tsdsr_jax.compile_watch import COMPILING, CompileWatch


def begin() -> None:
    jax.monitoring.record_event("/jax/compilation_cache/compile_requests_use_cache")


def end() -> None:
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)


def soon(condition) -> bool:
    """Whether a condition becomes true within some seconds."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_long_compilation_is_announced_once_and_its_time_counted():
    said, ended = [], []
    with CompileWatch(said.append, lambda: ended.append(1), patience=0.02) as watch:
        begin()
        assert soon(lambda: said == [COMPILING]) and not ended
        end()
        assert ended == [1] and watch.seconds >= 0.02
        counted = watch.seconds
        begin()
        time.sleep(0.05)
        end()
        assert said == [COMPILING] and watch.seconds >= counted + 0.05
    begin()
    assert watch.seconds < counted + 5


def test_the_next_is_announced_half_a_minute_later_if_it_lasts():
    said = []
    with CompileWatch(said.append, patience=0.01, again=0.2):
        begin()
        assert soon(lambda: len(said) == 1)
        end()
        begin()
        time.sleep(0.05)
        assert len(said) == 1
        assert soon(lambda: len(said) == 2)
        end()
    assert said[0] == COMPILING and said[1].startswith("still compiling (")


def test_one_that_lasts_is_announced_again():
    said = []
    with CompileWatch(said.append, patience=0.01, again=0.02):
        begin()
        assert soon(lambda: len(said) == 3)
        end()
        count = len(said)
        time.sleep(0.1)
    assert said[0] == COMPILING and len(said) == count
    assert all(line.startswith("still compiling (") and line.endswith(" s so far)") for line in said[1:])


def test_a_short_one_is_not():
    said = []
    with CompileWatch(said.append, patience=0.2) as watch:
        begin()
        end()
        end()  # one that was not announced to begin
        time.sleep(0.3)
    assert not said and watch.seconds < 0.2


def test_compilations_in_several_threads_count_once():
    ended = []
    with CompileWatch(lambda line: None, lambda: ended.append(1)) as watch:
        begin()
        other = threading.Thread(target=lambda: (begin(), time.sleep(0.05), end()))
        other.start()
        other.join()
        assert not ended
        end()
    assert ended == [1] and 0.05 <= watch.seconds < 0.5


def test_jax_reports_its_compilations_so(monkeypatch):
    ended = []
    with CompileWatch(lambda line: None, lambda: ended.append(1)) as watch:
        jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
    if jax.config.jax_compilation_cache_dir is None:
        pytest.skip("programs are not kept")
    assert ended and watch.seconds > 0
