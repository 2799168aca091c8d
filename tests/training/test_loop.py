"""When the loop logs, validates, saves and stops; its training step only counts."""

import dataclasses
import itertools
import os
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from tsdsr_jax.commands.distill import MEMORY_REMEDIES
from tsdsr_jax.errors import UserError
from tsdsr_jax.training import loop


@pytest.fixture(autouse=True)
def own_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Recorder:
    """Hooks that record their arguments."""

    def __init__(self):
        self.logged, self.validated, self.saved = [], [], []

    def hooks(self) -> loop.Hooks:
        return loop.Hooks(
            log=lambda step, values: self.logged.append((step, values["loss"])),
            validate=lambda state, step: self.validated.append((step, state)),
            save=lambda state, step: self.saved.append((step, state)),
        )


def count(state: int, batch: int):
    return state + batch, {"loss": jnp.float32(state), "bad_steps": jnp.int32(0)}


def schedule(**changes) -> loop.LoopSchedule:
    return loop.LoopSchedule(
        **(
            dict(
                start=0, end=10, log=3, checkpoint=4, validation=5, max_bad_steps=3, images=2, shown=("loss",)
            )
            | changes
        )
    )


def run(recorder, step=count, batches=None, **changes):
    batches = itertools.repeat(1) if batches is None else batches
    return loop.run_loop(
        changes.get("start", 0), step, batches, schedule(**changes), recorder.hooks(), loop.StopSignal()
    )


def test_every_step_is_logged_and_the_rest_happens_when_due():
    recorder = Recorder()
    assert run(recorder) == (10, 10)
    assert recorder.logged == [(step, step - 1.0) for step in range(1, 11)]
    assert recorder.validated == [(5, 5), (10, 10)]
    assert recorder.saved == [(4, 4), (8, 8), (10, 10)]


def test_a_resumed_run_does_the_remaining_steps():
    recorder = Recorder()
    assert run(recorder, start=7) == (10, 10)
    assert [step for step, _ in recorder.logged] == [8, 9, 10]
    assert [step for step, _ in recorder.saved] == [8, 10]


def batches_with(at: int, action):
    for index in itertools.count():
        if index == at:
            action()
        yield 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_stops(number, capsys):
    recorder = Recorder()
    stop = loop.StopSignal()
    batches = batches_with(5, lambda: os.kill(os.getpid(), number))
    assert loop.run_loop(0, count, batches, schedule(), recorder.hooks(), stop) == (6, 6)
    assert stop.received == number
    assert recorder.saved == [(4, 4), (6, 6)] and [step for step, _ in recorder.logged] == list(range(1, 7))
    assert f"{signal.Signals(number).name}: saving after this step" in capsys.readouterr().err


def test_a_signal_where_a_checkpoint_was_due_saves_once():
    recorder = Recorder()
    run(recorder, batches=batches_with(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert recorder.saved == [(4, 4)]


def test_a_signal_before_a_resumed_run_trains_is_not_forgotten(monkeypatch):
    """JAX then chooses 1: one more than the last number that it was asked with, which is 0 before the first question."""
    monkeypatch.setattr(loop.multihost_utils, "reached_preemption_sync_point", lambda number: number == 1)
    recorder, stop = Recorder(), loop.StopSignal()
    stop.together = True
    batches = itertools.repeat(1)
    assert loop.run_loop(7, count, batches, schedule(start=7), recorder.hooks(), stop) == (8, 8)
    assert recorder.saved == [(8, 8)]


def test_a_second_interrupt_stops_at_once():
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt):
        run(recorder, batches=batches_with(5, twice))
    assert recorder.saved == [(4, 4)]


def test_consecutive_bad_steps_stop_the_run_after_saving():
    def bad(state, batch):
        return state + 1, {"loss": jnp.float32(0), "bad_steps": jnp.int32(max(0, state - 4))}

    recorder = Recorder()
    with pytest.raises(
        UserError, match=r"3 steps in a row had non-finite gradients or updates \(--max_bad_steps 3\)"
    ):
        run(recorder, bad, log=1)
    assert recorder.saved == [(4, 4), (8, 8)]


def test_bad_steps_between_two_fetches_are_noticed():
    def bad(state, batch):
        return state + 1, {"loss": jnp.float32(0), "bad_steps": jnp.int32([0, 1, 2, 3, 0][state % 5])}

    with pytest.raises(UserError, match="3 steps in a row"):
        run(Recorder(), bad, log=5)


def test_bad_data_stops_the_run_after_saving():
    def refuse():
        raise UserError("too many bad samples")

    recorder = Recorder()
    with pytest.raises(UserError, match="too many bad samples"):
        run(recorder, batches=batches_with(6, refuse))
    assert recorder.saved == [(4, 4), (6, 6)]


def test_an_out_of_memory_error_lists_the_flags_that_help():
    def full(state, batch):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore"
        )

    with pytest.raises(UserError) as caught, loop.explained_memory(MEMORY_REMEDIES):
        run(Recorder(), full)
    message = str(caught.value)
    assert (
        "Out of memory while trying to allocate 9 bytes" in message
        and "more" not in message.split("To use less")[0]
    )
    for flag in (
        "--gradient_checkpointing",
        "--train_batch_size",
        "--split_guidance",
        "--fsdp",
        "--lambda_lpips 0",
    ):
        assert flag in message.partition("strongest first: ")[2]


def test_other_device_errors_keep_their_traceback():
    def broken(state, batch):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError), loop.explained_memory(MEMORY_REMEDIES):
        run(Recorder(), broken)


def test_without_a_terminal_progress_is_printed_as_lines(capsys):
    run(Recorder())
    assert "step 10/10" in capsys.readouterr().out


def test_compilation_is_no_part_of_the_rate_and_the_estimate(capsys):
    """The first call compiles; the workers' start is before it."""
    rates = []

    def step(state, batch):
        time.sleep(0.5 if state == 0 else 0.01)
        return count(state, batch)

    hooks = loop.Hooks(
        log=lambda step, values: rates.append(values["images_per_s"]),
        validate=lambda *_: None,
        save=lambda *_: None,
    )
    loop.run_loop(0, step, itertools.repeat(1), schedule(log=5), hooks, loop.StopSignal())
    assert len(rates) == 10 and min(rates) > 2 / 0.1


def test_waiting_for_data_is_logged_apart():
    rows = []
    hooks = loop.Hooks(
        log=lambda step, values: rows.append(values), validate=lambda *_: None, save=lambda *_: None
    )

    def slow():
        for number in itertools.count():
            time.sleep(0.2 if number == 3 else 0)
            yield 1

    loop.run_loop(0, count, slow(), schedule(log=1), hooks, loop.StopSignal())
    waits = [row["waiting_s"] for row in rows]
    assert waits[3] > 0.19 and max(waits[:3] + waits[4:]) < 0.1
    assert "waiting_longest" not in rows[0]  # there is only one process


def test_steps_are_traced(tmp_path):
    settings = dataclasses.replace(schedule(), profile=(2, 3, tmp_path / "profile"))
    loop.run_loop(0, count, itertools.repeat(1), settings, Recorder().hooks(), loop.StopSignal())
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
