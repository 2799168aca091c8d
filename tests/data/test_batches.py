"""The order of samples, for any number of readers, and what happens to bad samples."""

from itertools import chain

import ml_dtypes
import numpy as np
import pytest

from tsdsr_jax.data.batches import (
    TRIES,
    BadSamples,
    Batches,
    RowPlan,
    SampleShapes,
    first_sample,
    permutation,
    sample_at,
)
from tsdsr_jax.data.record import Record
from tsdsr_jax.errors import UserError


class Numbers:
    """Sample i is full of the number i; the ones in `bad` cannot be read. Importable by worker processes."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), odd: tuple[int, ...] = ()):
        self.count, self.bad, self.odd = count, bad, odd

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, epoch: int = 0) -> Record:
        if index in self.bad:
            raise UserError(f"{self.name(index)}: damaged")
        prompt = np.full((3 if index in self.odd else 2, 4), index, ml_dtypes.bfloat16)
        image = np.full((8, 8, 3), index, np.uint8)
        return Record(
            image, image, np.full((1, 1, 4), index, np.float32), prompt, np.full(5, index, np.float32)
        )

    def name(self, index: int) -> str:
        return f"sample {index}"


def batches(source: Numbers, rows: RowPlan, seed: int = 7) -> Batches:
    return Batches(source, SampleShapes.of_source(source), rows, seed)


def seen(stream) -> list[list[int]]:
    """The samples' numbers, step by step."""
    return [batch.records.pooled[..., 0].ravel().astype(int).tolist() for batch in stream]


def test_every_epoch_is_another_permutation():
    orders = [permutation(3, epoch, 100) for epoch in range(4)]
    for order in orders:
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in orders}) == 4
    assert tuple(permutation(4, 0, 100)) != tuple(orders[0])
    assert [sample_at(position, 3, 100) for position in (0, 99, 100, 250)] == [
        orders[0][0], orders[0][99], orders[1][0], orders[2][50]
    ]  # fmt: skip


def test_the_order_is_the_same_for_ever():
    """Saved runs depend on it: changing the order would change every resumed run."""
    assert permutation(43, 0, 12).tolist() == [2, 1, 5, 7, 8, 9, 4, 0, 6, 3, 11, 10]


def test_an_epoch_visits_every_sample_once():
    source = Numbers(12)
    steps = seen(batches(source, RowPlan(0, 6, 2, 2)))
    assert [len(step) for step in steps] == [4] * 6
    flat = list(chain.from_iterable(steps))
    assert sorted(flat[:12]) == sorted(flat[12:]) == list(range(12)) and flat[:12] != flat[12:]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch_in_order(processes):
    source = Numbers(30)
    whole = [batch.records.pooled[..., 0] for batch in batches(source, RowPlan(5, 4, 2, 8))]
    parts = [
        [batch.records.pooled[..., 0] for batch in batches(source, RowPlan(5, 4, 2, 8, process, processes))]
        for process in range(processes)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts], axis=1), batch)


def test_a_run_continues_where_it_was():
    source = Numbers(10)
    whole = seen(batches(source, RowPlan(0, 9, 1, 4)))
    assert seen(batches(source, RowPlan(5 * 4, 4, 1, 4))) == whole[5:]


def test_a_bad_sample_is_replaced_by_the_next_of_its_epoch():
    good = list(chain.from_iterable(seen(batches(Numbers(10), RowPlan(0, 5, 1, 2)))))
    stream = list(batches(Numbers(10, bad=(good[3],), odd=(good[6],)), RowPlan(0, 5, 1, 2)))
    replaced = list(chain.from_iterable(seen(stream)))
    assert replaced == [*good[:3], good[4], *good[4:6], good[7], *good[7:]]
    assert {name: problem for batch in stream for name, problem in batch.problems.items()} == {
        f"sample {good[3]}": f"sample {good[3]}: damaged",
        f"sample {good[6]}": f"sample {good[6]}: its prompt embedding has shape (3, 4); the run's samples have (2, 4)",
    }


def test_many_bad_samples_in_a_row_end_it():
    source = Numbers(40, bad=tuple(range(1, 40)))
    with pytest.raises(UserError, match=f"{TRIES} samples in a row cannot be used") as caught:
        list(batches(source, RowPlan(0, 20, 1, 2)))
    assert str(caught.value).count("damaged") == TRIES
    with pytest.raises(UserError, match="none of the first samples"):
        first_sample(Numbers(3, bad=(0, 1, 2)))


def test_too_many_bad_samples_end_it():
    bad = BadSamples(100, 0.02)
    assert bad.add({"a": "a: damaged"}) == ["a: damaged"]
    assert bad.add({"a": "a: damaged", "b": "b: damaged"}) == ["b: damaged"]
    assert bad.add({"b": "b: damaged"}) == []
    with pytest.raises(
        UserError, match=r"3 of 100 samples cannot be used, more than --max_bad_samples 0.02"
    ) as caught:
        bad.add({"c": "c: damaged"})
    assert "c: damaged" in str(caught.value)


def test_text_gets_one_dtype():
    source = Numbers(4)
    shapes = SampleShapes.of(source.read(0))
    assert shapes.text_dtype == ml_dtypes.bfloat16
    record = shapes.cast(source.read(1))
    assert record.prompt.dtype == record.pooled.dtype == ml_dtypes.bfloat16
