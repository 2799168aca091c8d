"""The folded transformer: equal to the plain one at t = 1000 and its prompt, smaller, and in eight bits nearly so."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from parity import TOLERANCE, error, random_params, uniform
from tsdsr_jax.models import folded as models_folded
from tsdsr_jax.models.eight_bits import StoredDense
from tsdsr_jax.models.folded import FoldedMMDiT, fold
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig, grid_positions, patchify
from tsdsr_jax.models.params import abstract_params

TOKENS = 7
KINDS = {
    "SD3": {},
    "SD3.5": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "norms and one dual block in the middle": dict(qk_norm="rms_norm", dual_attention_layers=(1,)),
    "one layer": dict(num_layers=1),
    "two layers": dict(num_layers=2),
}


def inputs(config: MMDiTConfig, batch: int, height: int, width: int) -> dict[str, Any]:
    return {
        "patches": patchify(jnp.asarray(uniform("z", (batch, height, width, 16))), config.patch_size),
        "positions": jnp.asarray(grid_positions(config, height, width)),
        "context": jnp.asarray(uniform("text", (TOKENS, config.joint_attention_dim))),
        "pooled": jnp.asarray(uniform("pooled", (config.pooled_projection_dim,))),
    }


def plain(config: MMDiTConfig, params: Any, given: dict[str, Any], lengths: Any = None) -> jax.Array:
    batch = given["patches"].shape[0]
    context, pooled = (jnp.stack([given[name]] * batch) for name in ("context", "pooled"))
    timestep = jnp.full((batch,), 1000.0)
    network = partial(MMDiT(config).apply, method="tokens")
    return jax.jit(network)(
        {"params": params}, given["patches"], given["positions"], timestep, context, pooled, lengths
    )


def folded(config: MMDiTConfig, params: Any, given: dict[str, Any], lengths: Any = None, **how) -> jax.Array:
    how = dict(dtype=jnp.float32) | how
    made = fold(config, params, given["context"], given["pooled"], 1000.0, **how)
    return jax.jit(FoldedMMDiT(config).apply)({"params": made}, given["patches"], given["positions"], lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_network(kind):
    """Float32, another order of summation; 5e-7 measured."""
    config = MMDiTConfig.tiny(**KINDS[kind])
    params, given = random_params(config), inputs(config, 2, 8, 12)
    assert error(folded(config, params, given), plain(config, params, given)) <= TOLERANCE


def test_padded_tokens_count_for_nothing():
    config = MMDiTConfig.tiny()
    params, given = random_params(config), inputs(config, 2, 6, 10)
    lengths = jnp.asarray([15, 4])
    ours = folded(config, params, given, lengths)
    for row, length in enumerate(lengths.tolist()):
        tokens = given["patches"][row : row + 1, :length]
        alone = given | {"patches": tokens, "positions": given["positions"][:length]}
        assert error(ours[row, :length], plain(config, params, alone)[0]) <= TOLERANCE


def test_sd3_loses_a_third_of_its_parameters():
    config = MMDiTConfig.sd3_medium()
    context, pooled = (jax.ShapeDtypeStruct(shape, jnp.float16) for shape in ((333, 4096), (2048,)))
    made = partial(fold, config, timestep=1000.0, dtype=jnp.float16)
    shapes = jax.eval_shape(made, abstract_params(config), context, pooled)
    counted = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    table = config.pos_embed_max_size**2 * config.width
    assert 1.33e9 < counted - table < 1.34e9
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float16)}


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("fp8", 0.05)])
def test_eight_bits_stay_near(kind, most):
    """0.3 % and 2.2 % of the largest velocity measured, with random weights. A single fp8 layer is up to 5 % apart (see
    test_eight_bits.py), and the residuals stay exact."""
    config = MMDiTConfig.tiny()
    params, given = random_params(config), inputs(config, 1, 8, 8)
    wanted = plain(config, params, given)
    apart = error(folded(config, params, given, eight_bits=kind), wanted)
    assert 1e-4 < apart <= most


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_only_blocks_are_stored_in_eight_bits(kind):
    config = MMDiTConfig.tiny()
    params, given = random_params(config), inputs(config, 1, 4, 4)
    made = fold(config, params, given["context"], given["pooled"], 1000.0, jnp.float16, kind)
    for path, leaf in flatten_dict(made).items():
        *layer, name = path
        beside = {path[-1] for path in flatten_dict(made) if path[:-1] == tuple(layer)}
        if path[0].startswith("layers_") and name == "kernel":
            assert leaf.dtype == (jnp.int8 if kind == "int8" else jnp.float8_e4m3fn)
        elif name in ("scale", "input_scale") and "kernel" in beside:
            assert leaf.dtype == jnp.float32
        else:
            assert leaf.dtype == jnp.float16
    if kind == "fp8":
        after_norm = {"q", "kv", "add_q", "add_kv", "net_0"}
        layers = {path[:-1] for path in flatten_dict(made) if path[-1] == "scale"}
        given_scales = {path[:-1] for path in flatten_dict(made) if path[-1] == "input_scale"}
        assert given_scales == {layer for layer in layers if layer[-1] not in after_norm}


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_exceeds_the_range_of_fp8(kind):
    """For any picture: here a flat one, noise, and one with a single large value, all far outside of what latents are."""
    config = MMDiTConfig.tiny(**KINDS[kind])
    params, given = random_params(config), inputs(config, 3, 8, 12)
    made = fold(config, params, given["context"], given["pooled"], 1000.0, jnp.float32, "fp8")
    seen = {}

    def watch(call, arguments, keywords, context):
        if isinstance(context.module, StoredDense) and "input_scale" in context.module.variables["params"]:
            scale = context.module.variables["params"]["input_scale"]
            seen[context.module.path] = float(jnp.abs(arguments[0]).max() / (448 * scale))
        return call(*arguments, **keywords)

    patches = given["patches"].at[0].set(100).at[1].multiply(1e4).at[2, 5, 3].set(1e6)
    with nn.intercept_methods(watch):
        FoldedMMDiT(config).apply({"params": made}, patches, given["positions"])
    assert len(seen) == 2 * (2 * config.num_layers - 1) + len(config.dual_attention_layers)
    assert 0.01 < max(seen.values()) <= 1


def test_folding_holds_two_layers_more_at_a_time(monkeypatch):
    """Of parameters on the host, seen before each layer is folded; all of them would be 24 layers."""
    config = MMDiTConfig.tiny(num_layers=24)
    params = jax.tree.map(np.asarray, random_params(config))
    given = inputs(config, 1, 4, 4)
    held, store = [], models_folded._stored_block

    def watched(*arguments, **how):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return store(*arguments, **how)

    monkeypatch.setattr(models_folded, "_stored_block", watched)
    before = sum(array.nbytes for array in jax.live_arrays())
    made = fold(config, params, given["context"], given["pooled"], 1000.0, jnp.float32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks_0"])) / 23
    assert len(held) == 24
    assert size < max(held) - before + layer < size + 3 * layer


def test_folding_a_layer_takes_little_memory():
    """One of SD3-medium's in float16, compiled and not run: temporaries of 0.4 GB."""
    config = MMDiTConfig.sd3_medium()
    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], jnp.float16), abstract_params(config)["blocks_0"]
    )
    how = dict(config=config, kind=config.runs()[0][2], dtype=jnp.float16, eight_bits=None)
    made = models_folded._stored_block.lower(
        half, jax.ShapeDtypeStruct((1536,), jnp.float32), **how
    ).compile()
    assert made.memory_analysis().temp_size_in_bytes < 5e8
