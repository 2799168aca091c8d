"""Prints a lease's figures as the tables of RESULTS.md.

python bench/lease/table.py results.jsonl [WORK/outputs]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Relative difference, root mean square, above which two sides do not compute the same: half precision rounds after every
# layer, and eight bits do so more coarsely. Losses: relative difference of the farthest.
FARTHEST = {"full": 0.03, "fp8": 0.15, "int8": 0.15, "losses": 0.1}
PARTS = ("encode", "transformer", "decode", "end", "stream")
NAMES = {"end": "end to end, host to host", "stream": "the same, in a stream of batches"}
Rows = list[dict[str, Any]]


def render(results: Path, outputs: Path | None = None) -> str:
    """All tables, as Markdown. Results that were kept in `outputs` are compared and their differences added to `results`."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    if outputs:
        found = list(differences(outputs))
        rows += found
        with results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    sections = [
        machine(rows),
        inference(rows),
        eight_bits(rows),
        training(rows),
        workers(rows),
        failures(rows),
    ]
    return "\n\n".join(section for section in sections if section)


def differences(outputs: Path) -> Iterator[dict[str, Any]]:
    """How far each worker's results are from PyTorch's eager ones, relative, root mean square."""
    for wanted in sorted((outputs / "eager").glob("*.npy")):
        part, batch = wanted.stem.split("-")
        for folder in sorted(outputs.iterdir()):
            file = folder / wanted.name
            if folder.name != "eager" and file.exists():
                ours, theirs = np.load(file), np.load(wanted)
                apart = float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))
                yield {"worker": folder.name, "part": part, "batch": int(batch), "apart": apart}


# --- looking figures up -----------------------------------------------------------------------------


def figure(rows: Rows, name: str, worker: str, **wanted: Any) -> Any:
    """The last figure of this name that a worker reported; None if there is none."""
    found = None
    for row in rows:
        if row["worker"] == worker and name in row and all(row.get(key) == wanted[key] for key in wanted):
            found = row[name]
    return found


def batches(rows: Rows) -> list[int]:
    """The batches that upscaling was measured at, the largest first."""
    return sorted({row["batch"] for row in rows if row.get("part") in PARTS}, reverse=True)


def shown(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def against(ours: float | None, theirs: float | None) -> str:
    """Their milliseconds, and in bold how many times as fast ours is."""
    if theirs is None:
        return "–"
    return f"{theirs:.2f}" + (f" (**{theirs / ours:.2f}×**)" if ours else "")


def judged(apart: float | None, most: float) -> str:
    if apart is None:
        return "not compared"
    return f"{apart:.1e}" if apart <= most else f"{apart:.1e}, **TOO FAR**"


def as_table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


# --- the tables -------------------------------------------------------------------------------------


def machine(rows: Rows) -> str:
    told = rows[0]
    card = told["machine"]
    name = card if isinstance(card, str) else f"{card['name']} (driver {card['driver_version']})"
    versions = ", ".join(f"{package} {version}" for package, version in told["versions"].items())
    told_clocks = [row["after"]["clocks.sm"] for row in rows if row.get("after")]
    clocks = [int(clock) for clock in told_clocks if clock.isdecimal()]
    lines = [f"{name}; {versions}; size {told['size']}."]
    if clocks:
        lines.append(f"Its clock after the turns: {min(clocks)} to {max(clocks)} MHz.")
    matmul, copy = figure(rows, "matmul_tflops", "ours"), figure(rows, "copy_gb_s", "ours")
    if matmul:
        lines.append(f"A large matrix product reaches {matmul:.3g} TFLOP/s, a copy {copy:.4g} GB/s.")
    return "\n".join(lines)


def inference(rows: Rows) -> str:
    lines = []
    matmul = figure(rows, "matmul_tflops", "ours")
    for batch in batches(rows):
        for part in PARTS:
            ours = figure(rows, "ms", "ours", part=part, batch=batch)
            theirs = [
                figure(rows, "ms", worker, part="end" if part == "stream" else part, batch=batch)
                for worker in ("eager", "compiled-1" if batch == 1 else "compiled", "lora")
            ]
            if ours is None and (part == "stream" or not any(theirs)):
                continue
            tflop = (figure(rows, "tflop_per_image", "ours") or {}).get(part)
            share = 100e3 * tflop / ours / matmul if tflop and ours and matmul else None
            apart = figure(rows, "apart", "ours", part=part, batch=batch)
            compared = "" if part == "stream" else judged(apart, FARTHEST["full"])
            cells = (against(ours, ms) for ms in theirs)
            lines.append(
                [
                    f"{NAMES.get(part, part)}, {batch} at a time",
                    shown(ours),
                    shown(share, ".0f", " %"),
                    *cells,
                    compared,
                ]
            )
    if not lines:
        return ""
    head = [
        "ms per image",
        "ours",
        "of the matrix product's rate",
        "PyTorch eager",
        "compiled",
        "LoRA beside",
        "apart",
    ]
    forced = [
        f"{row['worker']} at {row['batch']}"
        for row in rows
        if row.get("cudnn_attention_forced") and "batch" in row
    ]
    note = f"\n\ncuDNN's attention was forced, because it was faster: {', '.join(forced)}." if forced else ""
    return "## Upscaling\n\n" + as_table(head, lines) + note


def eight_bits(rows: Rows) -> str:
    lines = []
    for worker in ("fp8", "int8"):
        for batch in batches(rows):
            for part in PARTS:
                ours = figure(rows, "ms", worker, part=part, batch=batch)
                if ours is not None:
                    apart = figure(rows, "apart", worker, part=part, batch=batch)
                    compared = "" if part == "stream" else judged(apart, FARTHEST[worker])
                    full = figure(rows, "ms", "ours", part=part, batch=batch)
                    lines.append(
                        [
                            f"{worker}: {NAMES.get(part, part)}, {batch} at a time",
                            shown(ours),
                            against(ours, full),
                            compared,
                        ]
                    )
    return "## Upscaling in eight bits\n\n" + as_table(
        ["ms per image", "ours", "ours in full", "apart from PyTorch"], lines
    ) if lines else ""  # fmt: skip


def training(rows: Rows) -> str:
    lines = []
    for name, ours, theirs in (
        ("without gradient checkpointing", "train", "torch-train"),
        ("with gradient checkpointing", "train-checkpointing", "torch-train-checkpointing"),
    ):
        own, other = (figure(rows, "ms", worker, part="step") for worker in (ours, theirs))
        losses = [figure(rows, "losses", worker) for worker in (ours, theirs)]
        apart = max(abs(losses[0][key] / losses[1][key] - 1) for key in losses[1]) if all(losses) else None
        memory = [figure(rows, "memory_gb", worker) for worker in (ours, theirs)]
        if own or other:
            lines.append(
                [name, shown(own, ".1f"), against(own, other), *(shown(gb, ".1f") for gb in memory),
                 shown(figure(rows, "planned_gb", ours), ".1f"), judged(apart, FARTHEST["losses"])]
            )  # fmt: skip
    head = ["ms per image", "ours", "PyTorch", "GB: ours", "PyTorch", "ours as planned", "losses apart"]
    return "## A training step (two images, DASM, no LPIPS)\n\n" + as_table(head, lines) if lines else ""


def workers(rows: Rows) -> str:
    """Memory and preparation of every worker."""
    lines = []
    for worker in dict.fromkeys(row["worker"] for row in rows):
        told = [figure(rows, name, worker) for name in ("load_seconds", "compile_seconds", "memory_gb")]
        if any(told):
            lines.append([worker, *(shown(value, ".1f") for value in told)])
    head = ["worker", "loading, s", "compiling, s", "peak of its memory, GB"]
    return "## Preparation and memory\n\n" + as_table(head, lines) if lines else ""


def failures(rows: Rows) -> str:
    found = [f"- {row['worker']}: {row['failed']}" for row in rows if "failed" in row]
    return "## Not measured\n\n" + "\n".join(found) if found else ""


if __name__ == "__main__":
    print(render(Path(sys.argv[1]), *map(Path, sys.argv[2:])))
