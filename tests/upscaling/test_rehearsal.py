"""What is compiled while parameters are loaded is what the first batch runs, and nothing is left to compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event

import jax
import numpy as np
import pytest
from PIL import Image

from tiny_checkpoint import save_everything, synthetic_photo
from tsdsr_jax.errors import UserError
from tsdsr_jax.upscaling import loading
from tsdsr_jax.upscaling.batch_run import upscale_groups
from tsdsr_jax.upscaling.engine import Engine
from tsdsr_jax.upscaling.jobs import FileJob, Report
from tsdsr_jax.upscaling.loading import load_engine
from tsdsr_jax.upscaling.options import UpscaleOptions, complete_options
from tsdsr_jax.upscaling.planning import Group, Settings, plan_groups
from tsdsr_jax.upscaling.rehearsal import compile_ahead
from tsdsr_jax.upscaling.targets import find_jobs

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **more: (
        _compiled.append(str(more.get("fun_name"))) if name.endswith("backend_compile_duration") else None
    )
)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled in the block."""
    found: list[str] = []
    before = len(_compiled)
    yield found
    found += _compiled[before:]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_everything(folder)
    return folder


def load(root: Path, meanwhile: Callable[[Engine, Event], object] | None) -> Engine:
    options = UpscaleOptions(
        pretrained_model_name_or_path=str(root / "sd3"),
        lora_dir=str(root / "lora"),
        embedding_dir=root / "prompt",
        rank=None,
        rank_vae=None,
    )
    return load_engine(complete_options(options), jax.local_devices()[:1], lambda line: None, meanwhile)


def planned(folder: Path, sizes: list[tuple[int, int]]) -> tuple[list[Group[FileJob]], Settings, Report]:
    (folder / "in").mkdir()
    for index, size in enumerate(sizes):
        Image.fromarray(synthetic_photo(*size, index)).save(folder / "in" / f"{index}.png")
    settings = Settings(
        upscale=2, process_size=64, latent_tile=8, latent_overlap=2, max_pixels=10**7, photo_batch=2
    )
    report = Report(lambda line: None)
    jobs = find_jobs([folder / "in"], folder / "out").jobs
    return plan_groups(jobs, settings, 1, report), settings, report


SIZES = {
    "one": [(32, 32)],
    "tiles": [(40, 64)],
    "one bucket with padding": [(33, 52), (36, 56), (32, 50)],
}


@pytest.mark.parametrize("case", SIZES)
def test_nothing_is_left_to_compile(root: Path, tmp_path: Path, case: str) -> None:
    groups, settings, report = planned(tmp_path, SIZES[case])
    with compilations() as ahead:
        engine = load(root, partial(compile_ahead, groups=groups[:1], settings=settings))
    assert {"jit(_encode)", "jit(_velocity)", "jit(_decode)"} <= set(ahead)
    with compilations() as later:
        upscale_groups(engine, groups[:1], settings, report)
    assert report.written == len(groups[0].jobs) and not report.failures
    assert not later

    alone = Report(lambda line: None)
    pictures = [np.asarray(Image.open(job.target)) for job, _ in groups[0].jobs]
    upscale_groups(load(root, None), groups[:1], settings, alone, overwrite=True)
    for (job, _), picture in zip(groups[0].jobs, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(job.target)), picture)


def test_portraits_only_turn_the_weights(root: Path, tmp_path: Path) -> None:
    groups, settings, report = planned(tmp_path, [(56, 36)])
    engine = load(root, partial(compile_ahead, groups=groups, settings=settings))
    with compilations() as later:
        upscale_groups(engine, groups, settings, report)
    assert report.written == 1
    # Which small programs are compiled depends on the tests before; those of the networks are not.
    assert not {"jit(enlarge)", "jit(_encode)", "jit(_velocity)", "jit(_decode)"} & set(later)


def test_failures_wait_for_the_real_thing(root: Path) -> None:
    calls = itertools.count()

    def fail(engine: Engine, stop: Event) -> None:
        next(calls)
        raise UserError("not shown")

    assert load(root, fail).networks.nbytes > 0
    assert next(calls) == 1


def test_a_failed_load_does_not_wait_for_programs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Event] = []

    def compile_for_ever(engine: Engine, stop: Event) -> None:
        seen.append(stop)
        assert stop.wait(60)

    def damaged(*arguments: object, **more: object) -> None:
        raise UserError("not finite")

    monkeypatch.setattr(loading, "load_parts", damaged)
    with pytest.raises(UserError, match="not finite"):
        load(root, compile_for_ever)
    assert not seen or seen[0].is_set()
