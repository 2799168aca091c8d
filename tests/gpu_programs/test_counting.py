"""What bench/kernels.py counts in a program whose arithmetic and traffic are known."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from hlo import Program  # noqa: E402
from kernels import CARDS, MOVE, PRODUCT, Links, collectives, copies_weights, kernels, place  # noqa: E402

PROGRAM = Program((ROOT / "tests" / "support" / "counted.hlo").read_text())


@pytest.fixture(scope="module")
def counted():
    return {kernel.name: kernel for kernel in kernels(PROGRAM)}


def test_a_product_in_a_loop_counts_as_often_as_it_runs(counted):
    product = counted["made"]
    assert (product.kind, product.dtype, product.times) == (PRODUCT, "f16", 5)
    assert product.flop == 2 * 4 * 16 * 16
    assert product.read == 2 * (4 * 16 + 16 * 16) and product.written == 2 * 4 * 16  # not the workspace
    assert place(product) == "layers/attn/to_q/dot_general"


def test_only_the_slice_that_a_fusion_takes_is_read(counted):
    assert counted["first"].read == 4 * 16 * 2 + 4 and counted["first"].written == 4 * 16 * 2


def test_an_update_in_place_writes_the_update_alone(counted):
    assert counted["put_back"].kind == "update in place"
    assert counted["put_back"].written == 16 * 4 and counted["put_back"].read == 16 * 4 + 4


def test_a_copy_of_a_weight_is_known_as_one_also_inside_a_loop(counted):
    copy = counted["again"]
    assert copy.kind == MOVE and copy.times == 5 and copies_weights(copy)
    assert copy.read == copy.written == 16 * 16 * 2
    # `first` takes a layer out of a stack of weights, which is a copy, too.
    assert {name for name, kernel in counted.items() if copies_weights(kernel)} == {"again", "first"}


def test_convolutions_and_attention_count_their_arithmetic(counted):
    assert counted["map"].flop == 2 * (8 * 8 * 7) * (3 * 3 * 3)
    # 2 images, 6 heads, 5 queries, 9 keys; the first operand has 4·16 elements, so heads are 1 wide.
    assert counted["scores"].flop == 4 * (2 * 6 * 5 * 9) * (4 * 16 // (2 * 6 * 5))


def test_nothing_else_is_a_kernel(counted):
    assert set(counted) == {"first", "again", "made", "put_back", "map", "scores"}


def test_time_is_the_larger_of_arithmetic_and_traffic(counted):
    card, product = CARDS["H200"], counted["made"]
    assert card.seconds(product) == product.nbytes / (0.9 * 4.8e12)  # tiny: traffic takes longer
    assert card.arithmetic_seconds(product) == product.flop / (0.8 * 989e12)


SENDING = Program("""
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %part = bf16[1,4]{1,0} constant({...})
  %started = (bf16[1,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%part), dimensions={0}
  %whole = bf16[8,4]{1,0} all-gather-done(%started)
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%i, %whole)
}

%goes_on (state: (s32[], bf16[8,4])) -> pred[] {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[100], y: f32[20]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %y = f32[20]{0} parameter(1)
  %zero = (s32[], bf16[8,4]{1,0}) constant({...})
  %loop = (s32[], bf16[8,4]{1,0}) while(%zero), body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %both = (f32[100]{0}, f32[20]{0}) all-reduce-start(%x, %y), to_apply=%sum
  %summed = (f32[100]{0}, f32[20]{0}) all-reduce-done(%both)
  %share = f32[5]{0} reduce-scatter(%y), dimensions={0}, to_apply=%sum
  ROOT %first = f32[100]{0} get-tuple-element(%summed), index=0
}
""")


def test_what_devices_send_is_counted():
    """In loops as often as they turn; by the size of what is gathered or summed."""
    found = collectives(SENDING)
    assert [(each.code, each.dtype, each.nbytes, each.times) for each in found] == [
        ("all-gather", "bf16", 64, 24), ("all-reduce", "f32", 480, 1), ("reduce-scatter", "f32", 20, 1),
    ]  # fmt: skip
    assert [each.sent(4) for each in found] == [24 * 48, 720, 60]


def test_gradients_are_added_up_within_machines_then_between_them():
    links = Links(inside=100.0, outside=10.0, machine=4)
    assert links.all_reduce_seconds(1000, 1) == 0
    assert links.all_reduce_seconds(1000, 2) == 2 * 1000 / 2 / 100  # a machine that is not full
    assert links.all_reduce_seconds(1000, 4) == 2 * 1000 * 3 / 4 / 100
    assert links.all_reduce_seconds(1000, 8) == 15 + 2 * 1000 / 2 / 10
    assert links.all_reduce_seconds(1000, 16) == 15 + 2 * 1000 * 3 / 4 / 10
