"""Prints where the time between the command and the first file goes.

    python bench/start_up.py --pretrained_model_name_or_path sd3 -i photo.png -o outputs --overwrite

All flags are those of infer/upscale.py, which it runs. Run it twice: the second time, compiled programs lie on disk. Rows
overlap where threads work side by side, and rows further in are parts of the row above them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

START = time.perf_counter()

import jax
import jax.monitoring

from tsdsr_jax import cli
from tsdsr_jax.commands import upscale
from tsdsr_jax.upscaling import loading

IMPORTED = time.perf_counter()

# Module, function and row; one more space for each step inwards. Rows are printed in this order.
FUNCTIONS = (
    (upscale, "select_devices", "starting the devices"),
    (upscale, "load_engine", "loading"),
    (loading, "open_checkpoint", "  opening files"),
    (loading, "load_loras", "  reading LoRAs"),
    (loading, "misfit", "  comparing the folded file"),
    (loading, "folded_shapes", "  shapes"),
    (loading, "fold_parts", "  reading and folding the transformer"),
    (loading, "load_parts", "    waiting for the files of both networks"),
    (loading, "load_tensors", "  reading the folded transformer"),
    (upscale, "compile_ahead", "compiling beside the loading"),
    (upscale, "upscale_groups", "the first batch"),
)
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "all tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "all lowering",
    "/jax/core/compile/backend_compile_duration": "all compiling, or fetching from disk",
}


class Row:
    """When something first happened, how often, and how long it took in all."""

    def __init__(self) -> None:
        self.begin, self.calls, self.seconds = 0.0, 0, 0.0

    def add(self, begin: float, seconds: float, calls: int = 1) -> None:
        self.begin = begin if not self.calls else self.begin
        self.calls += calls
        self.seconds += seconds


def main() -> None:
    rows = {label: Row() for *_, label in FUNCTIONS} | {label: Row() for label in EVENTS.values()}
    for module, name, label in FUNCTIONS:
        setattr(module, name, watched(getattr(module, name), rows[label]))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            rows[EVENTS[event]].add(time.perf_counter() - seconds, seconds) if event in EVENTS else None
        )
    )
    upscale.main()
    end = time.perf_counter()
    print(f"{'':44}{'begin':>8}{'seconds':>9}{'calls':>7}")
    print(f"{'importing':44}{0:8.2f}{IMPORTED - START:9.2f}{1:7}")
    for label, row in rows.items():
        if row.calls:
            print(f"{label:44}{row.begin - START:8.2f}{row.seconds:9.2f}{row.calls:7}")
    print(f"{'in all':44}{0:8.2f}{end - START:9.2f}")


def watched(function: Callable[..., Any], row: Row) -> Callable[..., Any]:
    """The same function, with its time added to a row; of an iterator, the time in which it is asked for an item."""

    def call(*arguments: Any, **more: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments, **more)
        row.add(begin, time.perf_counter() - begin)
        return items(result) if isinstance(result, Iterator) else result

    def items(result: Iterator[Any]) -> Iterator[Any]:
        while True:
            begin = time.perf_counter()
            try:
                item = next(result)
            except StopIteration:
                return
            finally:
                row.add(begin, time.perf_counter() - begin, calls=0)
            yield item

    return call


if __name__ == "__main__":
    cli.run(main)
