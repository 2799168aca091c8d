"""Prints, as JSON, what the time until the first picture is spent on. Started by command_line.py.

Programs are compiled or read from disk side by side, so that their sum can exceed the time of the call that needs them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from tsdsr_jax import Upscaler

STARTED = float(os.environ["LEASE_STARTED"])
# JAX's events -> what they are called here.
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "of it tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "of it lowering",
    "/jax/core/compile/backend_compile_duration": "of it compiling or reading programs",
    "/jax/compilation_cache/cache_retrieval_time_sec": "of that reading programs",
}


def main(photo: str, model: str, lora: str, prompt: str, weights: str) -> None:
    imported = time.time()
    spent: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: spent.update({EVENTS[event]: seconds} if event in EVENTS else {})
    )
    jax.devices()
    begun = time.time()
    upscale = Upscaler.from_pretrained(model, lora=lora, prompt=Path(prompt), weights=weights)
    jax.block_until_ready((upscale.engine.networks.transformer, upscale.engine.networks.vae))
    loaded = time.time()
    image = np.asarray(Image.open(photo))
    loading = Counter(spent)
    spent.clear()
    upscale(image)
    first = time.time()
    upscale(image)
    phases = {"Python and imports": imported - STARTED, "device": begun - imported, "loading": loaded - begun}
    phases |= {f"loading: {name}": seconds for name, seconds in loading.items()}
    phases |= {"first picture": first - loaded} | {
        f"first picture: {name}": seconds for name, seconds in spent.items()
    }
    phases |= {"second picture": time.time() - first, "until the first picture": first - STARTED}
    print(json.dumps({name: round(seconds, 3) for name, seconds in phases.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
