"""Measures the training step in PyTorch and PEFT, eager, as TSD-SR's script does it, without LPIPS."""

import argparse
import os

# Ours only reads files and names constants here.
os.environ["JAX_PLATFORMS"] = "cpu"

import timing
import torch
from inputs import training_inputs
from torch_parts import attention, cudnn_is_faster
from torch_pipeline import DTYPES, TorchPipeline
from torch_training import TorchStep, load_adapters
from worker import ADAPTERS, FULL, MODEL, PROMPT, SECONDS, SIDE, Worker

from tsdsr_jax.distillation.losses import LossConfig

BATCH = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = "bf16" if DEVICE == "cuda" else "fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()

    worker = Worker()
    worker.wait_for_model()
    networks = TorchPipeline.load(MODEL, PROMPT, DEVICE, DTYPES[PRECISION])
    load_adapters(networks, ADAPTERS)
    torch.backends.cudnn.benchmark = True
    step = TorchStep(networks, PRECISION, LossConfig(weight_lpips=0.0), options.checkpointing)
    config = networks.transformer.config
    data = training_inputs(
        BATCH,
        SIDE,
        networks.vae.config.latent_channels,
        config.joint_attention_dim,
        config.pooled_projection_dim,
    )
    with worker.turn("step"):
        forced = DEVICE == "cuda" and cudnn_is_faster(
            BATCH,
            data["states"].shape[1] + (SIDE // 16) ** 2,
            config.num_attention_heads,
            config.attention_head_dim,
            DTYPES[PRECISION],
            backward=True,
        )
        worker.report(cudnn_attention_forced=forced)
        with attention(cudnn_first=forced):
            worker.report(losses=step.losses(data))
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            tensors = step.on_device(data)
            found = timing.in_turn({"": lambda: step.step(tensors)}, 3 * SECONDS if FULL else 0)[""]
        worker.report(part="step", batch=BATCH, **timing.summary(found, BATCH))
    if DEVICE == "cuda":
        worker.report(memory_gb=step.memory() / 1e9)


if __name__ == "__main__":
    if not FULL:
        torch.set_num_threads(1)  # a busy machine's second one mostly waits
    main()
