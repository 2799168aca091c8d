"""The transformer: against diffusers and PEFT, and against itself where two ways must agree.

Without torch the second half still runs, on random weights; test_golden.py then stands in for the first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import (
    TOLERANCE,
    config_of,
    error,
    leaves,
    lora_of,
    params_of,
    random_lora,
    random_params,
    uniform,
)
from tsdsr_jax.models import attention as models_attention
from tsdsr_jax.models import lora
from tsdsr_jax.models.attention import attention
from tsdsr_jax.models.mmdit import (
    Block,
    BlockKind,
    MMDiT,
    MMDiTConfig,
    grid_positions,
    patchify,
    sincos_table,
    unpatchify,
)
from tsdsr_jax.models.params import Tree

pytest_plugins = "parity"

STYLES: dict[str, dict[str, Any]] = {
    "sd3": {},
    # Like SD3.5-medium without its middle: two blocks with a second attention, then the last.
    "sd3.5": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
}
# And with it: three runs of blocks.
THREE_RUNS = dict(num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1))
LORA_STRENGTH = 0.3


class Inputs(NamedTuple):
    latents: np.ndarray
    timestep: np.ndarray
    context: np.ndarray
    pooled: np.ndarray


def draw(batch: int = 1, size: tuple[int, int] = (12, 20), seed: int = 0) -> Inputs:
    return Inputs(
        uniform("latents", (batch, *size, 16), seed),
        np.array([1000.0, 321.5, 3.0], np.float32)[:batch],
        uniform("context", (batch, 21, 48), seed),
        uniform("pooled", (batch, 40), seed),
    )


@lru_cache(maxsize=64)
def program(config: MMDiTConfig, **options: Any) -> Any:
    """The jitted network, one for all tests, so that equal shapes are compiled once."""
    return jax.jit(MMDiT(config, **options).apply)


def ours(config: MMDiTConfig, params: Tree, inputs: Inputs, adapter: Tree | None = None, **options: Any):
    """The velocity (B, h, w, C)."""
    variables = {"params": params} | ({"lora": adapter} if adapter else {})
    return program(config, **options)(variables, *inputs)


def velocity_of(model: Any, inputs: Inputs) -> Any:
    """diffusers' velocity as a tensor (B, h, w, C), with its graph."""
    import torch

    latents, timestep, context, pooled = (torch.from_numpy(array) for array in inputs)
    result = model(
        hidden_states=latents.permute(0, 3, 1, 2),
        timestep=timestep,
        encoder_hidden_states=context,
        pooled_projections=pooled,
    ).sample
    return result.permute(0, 2, 3, 1)


def theirs(model: Any, inputs: Inputs) -> np.ndarray:
    import torch

    with torch.no_grad():
        return velocity_of(model, inputs).numpy()


# --- against diffusers and PEFT ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "batch", "remat"),
    [((16, 16), 1, False), ((12, 20), 3, False), ((22, 8), 3, True)],
    ids=str,
)
@pytest.mark.parametrize("style", STYLES)
def test_velocity_equals_diffusers(
    oracle: Any, style: str, size: tuple[int, int], batch: int, remat: bool
) -> None:
    model = oracle.tiny_transformer(seed=1, **STYLES[style])
    inputs = draw(batch, size, seed=batch)
    velocity = ours(config_of(model), params_of(model), inputs, remat=remat)
    assert error(velocity, theirs(model, inputs)) <= TOLERANCE


def test_three_runs_of_blocks_equal_diffusers(oracle: Any) -> None:
    model = oracle.tiny_transformer(seed=1, **THREE_RUNS)
    oracle.add_student_lora(model, rank=4, seed=3, strength=LORA_STRENGTH)
    plain, inputs = oracle.tiny_transformer(seed=1, **THREE_RUNS), draw(2)
    config, params, adapter = config_of(plain), params_of(plain), lora_of(oracle, model)
    assert [length for _, length, _ in config.runs()] == [2, 2, 1]
    assert error(ours(config, params, inputs, adapter), theirs(model, inputs)) <= TOLERANCE


@pytest.mark.parametrize(("kind", "remat"), [("student", False), ("aux", True)])
@pytest.mark.parametrize("style", STYLES)
def test_adapter_equals_peft_applied_and_merged(oracle: Any, style: str, kind: str, remat: bool) -> None:
    model = oracle.tiny_transformer(seed=2, **STYLES[style])
    config, params, inputs = config_of(model), params_of(model), draw(3, seed=5)
    plain = theirs(model, inputs)
    getattr(oracle, f"add_{kind}_lora")(model, rank=4, seed=3, strength=LORA_STRENGTH)
    adapter = lora_of(oracle, model)
    expected = theirs(model, inputs)
    assert error(expected, plain) > 0.03  # the adapter matters
    assert ("proj" in adapter.get("pos_embed", {})) == (kind == "student")
    assert error(ours(config, params, inputs, adapter, remat=remat), expected) <= TOLERANCE
    if not remat:
        assert error(ours(config, lora.merge(params, adapter), inputs), expected) <= TOLERANCE


@pytest.mark.parametrize("style", ["sd3.5"])
def test_one_base_serves_three_adapters_in_one_program(oracle: Any, style: str) -> None:
    model = oracle.tiny_transformer(seed=4, **STYLES[style])
    config, params, inputs = config_of(model), params_of(model), draw(3, seed=6)
    oracle.add_student_lora(model, rank=4, seed=1, strength=LORA_STRENGTH, adapter="student")
    oracle.add_student_lora(model, rank=6, seed=2, strength=LORA_STRENGTH, adapter="teacher")
    oracle.add_aux_lora(model, rank=2, seed=3, strength=LORA_STRENGTH, adapter="auxiliary")
    names = ("student", "teacher", "auxiliary")
    adapters = {name: lora_of(oracle, model, name) for name in names}
    assert [set(lora.modules(adapters[name]).values()) for name in names] == [{4}, {6}, {2}]

    @jax.jit
    def predict(params, adapters, inputs):
        apply = MMDiT(config).apply
        return {name: apply({"params": params, "lora": tree}, *inputs) for name, tree in adapters.items()}

    velocities = predict(params, adapters, inputs)
    for name in names:
        model.set_adapter(name)
        assert error(velocities[name], theirs(model, inputs)) <= TOLERANCE, name
    assert error(velocities["student"], velocities["teacher"]) > 0.03


@pytest.mark.parametrize("style", STYLES)
def test_adapter_gradients_equal_torchs(oracle: Any, style: str) -> None:
    """Through rematerialized blocks; a test below compares these with plain ones."""
    import torch

    model = oracle.tiny_transformer(seed=7, **STYLES[style])
    config, params, inputs = config_of(model), params_of(model), draw(3, seed=8)
    oracle.add_student_lora(model, rank=3, seed=9, strength=LORA_STRENGTH)
    adapter = lora_of(oracle, model)
    weight = uniform("cotangent", inputs.latents.shape)
    (velocity_of(model, inputs) * torch.from_numpy(weight)).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad
    idle = f"blocks_{len(config.runs()) - 1}/attn/add_q_proj"  # the last text queries lead nowhere
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.grad is None:
            assert f"blocks.{config.num_layers - 1}.attn.add_q_proj" in name
            parameter.data = torch.zeros_like(parameter)
    expected = leaves(lora_of(oracle, model))
    gradients = leaves(adapter_gradient(config, params, adapter, inputs, weight, remat=True))
    for path in expected:
        if path.startswith(idle):
            assert not gradients[path].any() and not expected[path].any()
            continue
        # A gradient sums over tokens and layers both ways: a little beyond the forward pass's tolerance.
        assert error(gradients[path], expected[path]) <= 3 * TOLERANCE, path


def adapter_gradient(
    config: MMDiTConfig, params: Tree, adapter: Tree, inputs: Inputs, weight: np.ndarray, remat: bool
) -> Tree:
    model = MMDiT(config, remat=remat)

    def loss(adapter: Tree) -> jax.Array:
        return (model.apply({"params": params, "lora": adapter}, *inputs) * weight).sum()

    return jax.jit(jax.grad(loss))(adapter)


@pytest.mark.parametrize("style", STYLES)
def test_first_wrong_layer_can_be_named(oracle: Any, style: str) -> None:
    """Every block's streams come out of the scan, and an altered block is the first that differs from torch's."""
    model = oracle.tiny_transformer(seed=10, **STYLES[style])
    config, params, inputs = config_of(model), params_of(model), draw(2, seed=11)
    expected: list[tuple[np.ndarray | None, np.ndarray]] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, given, streams: expected.append(streams))
    theirs(model, inputs)

    def errors(params: Tree) -> list[float]:
        found = captured_blocks(config, params, inputs)
        assert len(found) == len(expected) == config.num_layers
        return [
            error(image, reference[1].numpy()) for (image, _), reference in zip(found, expected, strict=True)
        ]

    assert max(errors(params)) <= TOLERANCE
    for (_, text), reference in zip(captured_blocks(config, params, inputs)[:-1], expected, strict=False):
        assert error(text, reference[0].numpy()) <= TOLERANCE
    ff = params["blocks_0"]["ff"]["net_2"]
    ff["kernel"] = ff["kernel"].at[1].multiply(1.01)  # the second layer of the first run
    wrong = [index for index, value in enumerate(errors(params)) if value > TOLERANCE]
    assert wrong == list(range(1, config.num_layers))


@lru_cache(maxsize=8)
def capturing(config: MMDiTConfig) -> Any:
    def run(params: Tree, inputs: Inputs) -> Tree:
        return MMDiT(config).apply(
            {"params": params},
            *inputs,
            capture_intermediates=lambda module, _: isinstance(module, Block),
            mutable="intermediates",
        )[1]["intermediates"]

    return jax.jit(run)


def captured_blocks(config: MMDiTConfig, params: Tree, inputs: Inputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image, text) stream after every block, in order."""
    captured = capturing(config)(params, inputs)
    blocks = []
    for index, (_, length, _) in enumerate(config.runs()):
        ((image, text), _) = captured[f"blocks_{index}"]["__call__"][0]
        assert image.shape[0] == text.shape[0] == length
        blocks += zip(np.asarray(image), np.asarray(text), strict=True)
    return blocks


@pytest.mark.parametrize("size", [dict(), dict(sample_size=128, pos_embed_max_size=96), dict(sample_size=64)])
def test_initial_position_table_equals_diffusers(oracle: Any, size: dict[str, int]) -> None:
    from diffusers.models.embeddings import PatchEmbed

    config = MMDiTConfig.tiny(**size)
    side = config.sample_size
    embedding = PatchEmbed(
        height=side,
        width=side,
        patch_size=2,
        in_channels=16,
        embed_dim=64,
        pos_embed_max_size=config.pos_embed_max_size,
    )
    expected = embedding.pos_embed.reshape(config.pos_embed_max_size, -1, 64).numpy()
    # Sines of up to 64, computed in float32 there and in float64 here.
    np.testing.assert_allclose(sincos_table(config), expected, atol=5e-6, rtol=0)


# --- two ways that must agree -----------------------------------------------------------------


@pytest.fixture(scope="module", params=STYLES)
def random(request: pytest.FixtureRequest) -> tuple[MMDiTConfig, Tree]:
    config = MMDiTConfig.tiny(**STYLES[request.param])
    return config, random_params(config)


def test_packed_tiles_equal_each_alone(random: tuple[MMDiTConfig, Tree]) -> None:
    config, params = random
    sizes = [(8, 12), (12, 20)]
    adapter = random_lora(config, lora.STUDENT_TARGETS, rank=4)
    inputs = draw(2, (16, 20))
    tiles = [inputs.latents[i, : size[0], : size[1]][None] for i, size in enumerate(sizes)]
    lengths = np.array([height * width // 4 for height, width in sizes])
    tokens = max(lengths) + 4
    patches = 30 * uniform("garbage", (2, tokens, 64))
    positions = np.zeros((2, tokens), np.int32)
    for i, (tile, size) in enumerate(zip(tiles, sizes, strict=True)):
        patches[i, : lengths[i]] = patchify(tile, 2)[0]
        positions[i, : lengths[i]] = grid_positions(config, *size)

    @jax.jit
    def packed(lengths):
        return MMDiT(config).apply(
            {"params": params, "lora": adapter}, patches, positions, *inputs[1:], lengths, method="tokens"
        )

    together, unmasked = packed(lengths), packed(None)
    for i, size in enumerate(sizes):
        alone = ours(config, params, Inputs(tiles[i], *(array[i : i + 1] for array in inputs[1:])), adapter)
        unpacked = unpatchify(together[i : i + 1, : lengths[i]], *size, 2)
        assert error(unpacked, alone) <= TOLERANCE
        assert error(unpatchify(unmasked[i : i + 1, : lengths[i]], *size, 2), alone) > 0.01


def test_shared_positions_equal_each_rows_own(random: tuple[MMDiTConfig, Tree]) -> None:
    config, params = random
    inputs = draw(2, (8, 12))
    patches, positions = patchify(inputs.latents, 2), grid_positions(config, 8, 12)
    run = jax.jit(lambda p: MMDiT(config).apply({"params": params}, patches, p, *inputs[1:], method="tokens"))
    np.testing.assert_array_equal(run(positions), run(np.stack([positions] * 2)))


def test_adapter_as_collection_equals_merged(random: tuple[MMDiTConfig, Tree]) -> None:
    config, params = random
    adapter, inputs = random_lora(config, lora.STUDENT_TARGETS, rank=4), draw(2)
    applied = ours(config, params, inputs, adapter)
    assert error(ours(config, lora.merge(params, adapter), inputs), applied) <= TOLERANCE
    assert error(ours(config, params, inputs), applied) > 0.03


def test_new_adapter_changes_nothing(random: tuple[MMDiTConfig, Tree]) -> None:
    config, params = random
    adapter, inputs = lora.init(jax.random.key(0), params, lora.STUDENT_TARGETS, 4), draw(2)
    np.testing.assert_array_equal(ours(config, params, inputs, adapter), ours(config, params, inputs))


def test_remat_gives_the_same_gradients(random: tuple[MMDiTConfig, Tree]) -> None:
    config, params = random
    adapter, inputs = random_lora(config, lora.STUDENT_TARGETS, rank=4), draw(2)
    weight = uniform("cotangent", inputs.latents.shape)
    everything = jax.checkpoint_policies.everything_saveable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.checkpoint_policies, "dots_with_no_batch_dims_saveable", everything)
        plain = leaves(adapter_gradient(config, params, adapter, inputs, weight, remat=False))
    partly = leaves(adapter_gradient(config, params, adapter, inputs, weight, remat=False))
    recomputed = leaves(adapter_gradient(config, params, adapter, inputs, weight, remat=True))
    idle = f"blocks_{len(config.runs()) - 1}/attn/add_q_proj"
    for path in plain:
        assert plain[path].any() != path.startswith(idle), path
        if plain[path].any():
            assert error(recomputed[path], plain[path]) <= TOLERANCE, path
            assert error(partly[path], plain[path]) <= TOLERANCE, path


def test_blocks_are_scanned_and_rematerialized(random: tuple[MMDiTConfig, Tree]) -> None:
    config, params = random
    for remat in (False, True):
        model = MMDiT(config, remat=remat)
        equations = jax.make_jaxpr(lambda model=model: model.apply({"params": params}, *draw()))().eqns
        scans = [equation for equation in equations if equation.primitive.name == "scan"]
        assert [equation.params["length"] for equation in scans] == [run[1] for run in config.runs()]
        for scan in scans:
            (block,) = (
                each
                for each in scan.params["jaxpr"].eqns
                if each.primitive.name.startswith(("remat", "check"))
            )
            assert (block.params["policy"] is None) == remat  # without it, linear layers' results are kept


# bfloat16 has 8 bits of mantissa and float16 11; through three to five blocks that leaves about 1 % and 0.2 %.
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 0.05), (jnp.float16, 0.006)])
def test_half_precision(random: tuple[MMDiTConfig, Tree], dtype: Any, tolerance: float) -> None:
    config, params = random
    adapter, inputs = random_lora(config, lora.STUDENT_TARGETS, rank=4), draw(2)
    half = ours(config, params, inputs, adapter, dtype=dtype)
    assert half.dtype == dtype
    assert 1e-4 < error(half, ours(config, params, inputs, adapter)) <= tolerance


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 8), (8, 9), (98, 8), (8, 98)])
def test_latents_that_do_not_fit_are_refused(size: tuple[int, int]) -> None:
    config = MMDiTConfig.tiny()
    with pytest.raises(ValueError, match="multiples of 2" if size[0] % 2 or size[1] % 2 else "ends at 96"):
        jax.eval_shape(MMDiT(config).init, jax.random.key(0), *draw(1, size))


def test_largest_latent_fills_the_position_table() -> None:
    config = MMDiTConfig.tiny()
    np.testing.assert_array_equal(grid_positions(config, 96, 96), np.arange(48 * 48))


def test_positions_are_the_tables_center() -> None:
    """SPEC §1: top = (P − h/2) // 2, left likewise, whichever sides are odd."""
    positions = grid_positions(MMDiTConfig.tiny(pos_embed_max_size=9), 6, 8).reshape(3, 4)
    np.testing.assert_array_equal(positions, (3 + np.arange(3))[:, None] * 9 + 2 + np.arange(4))


def test_patches_hold_row_column_channel_and_come_back() -> None:
    latents = uniform("latents", (2, 6, 8, 5))
    patches = np.asarray(patchify(latents, 2))
    assert patches.shape == (2, 12, 20)
    np.testing.assert_array_equal(patches[1, 4 + 2], latents[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 6, 8, 2), latents)


def test_attention_counts_the_first_keys_only() -> None:
    q, k, v = (uniform(name, (3, 10, 2, 16)) for name in "qkv")
    lengths = np.array([10, 1, 6])
    out = attention(q, k, v, lengths=lengths)
    for row, length in enumerate(lengths):
        scores = np.einsum("qnh,knh->nqk", q[row], k[row, :length]) / 4
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("nqk,knh->qnh", weights / weights.sum(-1, keepdims=True), v[row, :length])
        assert error(out[row], expected) <= TOLERANCE


@pytest.mark.parametrize(("cores", "groups"), [(None, None), (1, 4), (4, 2), (5, 2), (64, 1)])
@pytest.mark.parametrize("lengths", [None, (31, 7)])
def test_attention_on_cpus_equals_xlas(
    cores: int | None, groups: int | None, lengths: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All heads at once, and a few after the other where there are many scores; gradients, too."""
    q, k, v = uniform("q", (2, 9, 4, 8)), uniform("k", (2, 40, 4, 8)), uniform("v", (2, 40, 4, 8))
    if cores:
        monkeypatch.setattr(models_attention, "_LOOP_SCORES", 2 * 4 * 9 * 40)
        monkeypatch.setattr(models_attention, "cores", lambda: cores)
        assert 4 // models_attention._heads_together(4, 2, 2 * 9 * 40) == groups
    counted = None if lengths is None else jnp.asarray(lengths)

    def run(implementation: str):
        def total(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention(*parts, lengths=counted, implementation=implementation)
            return jnp.square(out).sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    ((_, ours), slopes), ((_, theirs), expected) = run("cpu"), run("xla")
    assert error(ours, theirs) <= TOLERANCE
    assert all(error(*pair) <= TOLERANCE for pair in zip(slopes, expected, strict=True))


def test_heads_whose_scores_leave_the_cache_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_attention, "cores", lambda: 64)
    together = models_attention._heads_together
    assert [together(24, 1, side**2) for side in (500, 1357, 2637, 4429)] == [12, 2, 1, 1]
    assert together(38, 16, 1) == 2  # no divisor in between


def test_runs_split_where_blocks_differ() -> None:
    config = MMDiTConfig.tiny(num_layers=6, dual_attention_layers=(0, 1, 3))
    kinds = [(first, length, kind.dual_attention) for first, length, kind in config.runs()]
    assert kinds == [(0, 2, True), (2, 1, False), (3, 1, True), (4, 1, False), (5, 1, False)]
    assert [kind.context_pre_only for _, _, kind in config.runs()] == [False] * 4 + [True]
    assert MMDiTConfig.sd3_medium().runs() == [
        (0, 23, BlockKind(False, False)),
        (23, 1, BlockKind(False, True)),
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(qk_norm="layer_norm"), "qk_norm is 'layer_norm'"),
        (dict(caption_projection_dim=60), "caption_projection_dim is 60"),
        (dict(dual_attention_layers=(0, 3)), "dual_attention_layers"),
    ],
)
def test_unknown_configurations_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDiTConfig.tiny(**overrides)
