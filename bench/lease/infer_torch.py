"""Measures PyTorch's upscaling: the LoRA merged, eager or compiled; or beside the weights, as TSD-SR's script has it."""

import argparse
import time

import timing
import torch
from torch_parts import as_array, attention, cudnn_is_faster, synchronized, torch_part
from torch_pipeline import TorchPipeline
from worker import FULL, MODEL, PROMPT, SECONDS, SIDE, Worker

PARTS = ("encode", "transformer", "decode", "end")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--how", choices=("eager", "compiled", "lora"), required=True)
    parser.add_argument("--batches", default="8,1")
    options = parser.parse_args()

    worker = Worker()
    # Like ours: choose convolutions by measurement, and compute float32 without TF32.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    worker.wait_for_model()
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    start = time.perf_counter()
    networks = TorchPipeline.load(MODEL, PROMPT, DEVICE, dtype)
    worker.report(load_seconds=time.perf_counter() - start)
    if options.how == "lora":
        networks.add_lora()
    if options.how == "compiled":
        networks.compile()
    for batch in map(int, options.batches.split(",")):
        forced = choose_attention(worker, networks, batch)
        with attention(cudnn_first=forced):
            measure(worker, networks, batch, compiled=options.how == "compiled")
    if DEVICE == "cuda":
        worker.report(memory_gb=torch.cuda.max_memory_allocated() / 1e9)


def choose_attention(worker: Worker, networks: TorchPipeline, batch: int) -> bool:
    """Whether to force cuDNN's attention, because it is faster here than PyTorch's own choice."""
    if DEVICE == "cpu":
        return False
    config, tokens = networks.transformer.config, networks.text.states.shape[1]
    with worker.turn("attention"):
        faster = cudnn_is_faster(
            batch,
            tokens + (SIDE // 16) ** 2,
            config.num_attention_heads,
            config.attention_head_dim,
            networks.text.states.dtype,
            backward=False,
        )
    worker.report(batch=batch, cudnn_attention_forced=faster)
    return faster


def measure(worker: Worker, networks: TorchPipeline, batch: int, compiled: bool) -> None:
    work = {part: torch_part(part, batch, SIDE, networks) for part in PARTS}
    if compiled:  # outside the turn: it takes a minute or more
        start = time.perf_counter()
        for part in PARTS:
            synchronized(DEVICE, work[part])()
        worker.report(batch=batch, compile_seconds=time.perf_counter() - start)
    with worker.turn(f"batch {batch}"):
        results = {part: as_array(synchronized(DEVICE, work[part])()) for part in PARTS}
        for part in PARTS:
            found = timing.rate(work[part], wait, SECONDS)
            worker.report(part=part, batch=batch, **timing.per_image(found, batch))
    for part, result in results.items():
        worker.keep(part, batch, result)


def wait(result: object) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    if not FULL:
        torch.set_num_threads(1)  # a busy machine's second one mostly waits
    main()
