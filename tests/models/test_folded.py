"""The folded transformer: equal to the plain one at t = 1000 and its prompt, smaller, and in eight bits nearly so."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import TOLERANCE, error, random_params, uniform
from tsdsr_jax.models import folded as models_folded
from tsdsr_jax.models.folded import FoldedMMDiT, fold, quantized
from tsdsr_jax.models.layers import Dense
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


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.01), ("fp8", 0.04)])
def test_eight_bits_stay_near(kind, most):
    """0.4 % and 1.9 % of the largest velocity measured, with random weights."""
    config = MMDiTConfig.tiny()
    params, given = random_params(config), inputs(config, 1, 8, 8)
    wanted = plain(config, params, given)
    apart = error(folded(config, params, given, eight_bits=kind), wanted)
    assert 1e-4 < apart <= most


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_keep_their_digits_in_half_precision(kind):
    """Behind a gate near zero a scale is below float16's smallest normal number."""
    config = MMDiTConfig.tiny()
    params, given = random_params(config), inputs(config, 1, 4, 4)
    made = fold(config, params, given["context"], given["pooled"], 1000.0, jnp.float16, kind)
    scales = {
        leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(made) if path[-1].key == "scale"
    }
    assert scales == {np.dtype(np.float32)}
    layer = {"kernel": jnp.full((4, 2), 100, jnp.int8), "scale": jnp.full(2, 3e-8), "bias": jnp.zeros(2)}
    out = Dense(2, jnp.float16).apply({"params": layer}, jnp.full((1, 4), 1000, jnp.float16))
    assert error(out, np.full((1, 2), 4 * 1000 * 100 * 3e-8)) <= 0.02


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


@pytest.mark.parametrize(("kind", "relative"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_quantized_kernels(kind, relative):
    """Every weight within half a step: of int8, of the output's largest; of e4m3, of the weight itself."""
    kernel = uniform("kernel", (3, 40, 5)) * np.linspace(0.01, 100, 5, dtype=np.float32)
    kernel[:, :, 2] = 0
    made = quantized({"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((3, 5))}}, kind)["dense"]
    assert made["kernel"].dtype == (jnp.int8 if kind == "int8" else jnp.float8_e4m3fn)
    back = np.asarray(made["kernel"].astype(jnp.float32)) * np.asarray(made["scale"])[:, None]
    largest = np.abs(kernel).max(1, keepdims=True)
    # Below e4m3's smallest normal number, 2⁻⁶ of 448, steps are absolute.
    allowed = largest if kind == "int8" else np.maximum(np.abs(kernel), largest * 2.0**-6 / 448)
    assert (np.abs(back - kernel) <= relative * allowed * (1 + 1e-5)).all()
    assert not back[:, :, 2].any()

    layer = {name: leaf[0] for name, leaf in made.items()}
    x = uniform("x", (2, 40))
    assert error(Dense(5).apply({"params": layer}, x), x @ back[0]) <= 1e-6
