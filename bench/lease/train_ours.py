"""Measures our training step: student and auxiliary network, DASM, guidance, without LPIPS."""

import argparse
import time

import jax
import timing
from infer_ours import peak_memory
from inputs import training_inputs
from our_training import OurStep, load_adapters
from worker import ADAPTERS, FULL, MODEL, SECONDS, SIDE, Worker

from tsdsr_jax import devices
from tsdsr_jax.distillation.losses import LossConfig
from tsdsr_jax.weights.sd3_folder import open_checkpoint

BATCH = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()

    worker = Worker()
    worker.wait_for_model()
    dtype = devices.DTYPES["bf16" if jax.default_backend() == "gpu" else "fp32"]
    step, data = prepare(dtype, options.checkpointing)
    samples = step.samples(data)
    start = time.perf_counter()
    step.step(samples)
    worker.report(compile_seconds=time.perf_counter() - start)
    with worker.turn("step"):
        found = timing.in_turn({"": lambda: step.step(samples)}, 3 * SECONDS if FULL else 0)[""]
        worker.report(part="step", batch=BATCH, **timing.summary(found, BATCH))
    worker.report(memory_gb=peak_memory())
    # The figures above are safe if the time ends here.
    worker.report(planned_gb=step.memory(samples) / 1e9)
    worker.report(losses=step.losses(data))


def prepare(dtype: jax.typing.DTypeLike, remat: bool) -> tuple[OurStep, dict]:
    checkpoint = open_checkpoint(MODEL)
    networks = checkpoint.network("transformer"), checkpoint.network("vae")
    configs = networks[0].config, networks[1].config
    data = training_inputs(
        BATCH,
        SIDE,
        configs[1].latent_channels,
        configs[0].joint_attention_dim,
        configs[0].pooled_projection_dim,
    )
    params = networks[0].load(dtype), networks[1].load(dtype)
    adapters = load_adapters(ADAPTERS, *configs)
    return OurStep(configs, params, adapters, dtype, LossConfig(weight_lpips=0.0), remat), data


if __name__ == "__main__":
    main()
