"""The name tables: every torch tensor is consumed exactly once, at every size, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from parity import MemoryReader, arrays, config_of, leaves, random_lora, random_tensors, torch_shapes
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights import lora_files, torch_names

pytest_plugins = "parity"

SD35_MEDIUM = dataclasses.replace(
    MMDiTConfig.sd3_medium(),
    qk_norm="rms_norm",
    dual_attention_layers=tuple(range(13)),
    pos_embed_max_size=384,
)
CONFIGS = {
    "tiny": MMDiTConfig.tiny(),
    "tiny SD3.5": MMDiTConfig.tiny(num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "SD3-medium": MMDiTConfig.sd3_medium(),
    "SD3.5-medium": SD35_MEDIUM,
    "tiny VAE": VAEConfig.tiny(block_out_channels=(8, 16, 32, 32)),
    "SD3's VAE": VAEConfig.sd3(),
}


# --- exactly once -----------------------------------------------------------------------------


def diffusers_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """What diffusers' own model of this config stores; no memory is taken."""
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from tsdsr_jax.weights.sd3_folder import torch_config

    values = {key: value for key, value in torch_config(config).items() if key != "_class_name"}
    kind = SD3Transformer2DModel if isinstance(config, MMDiTConfig) else AutoencoderKL
    # diffusers computes the position table in float64; a small one of the same width has the same name.
    side = values.get("pos_embed_max_size")
    small = {"pos_embed_max_size": 8} if side else {}
    with torch.device("meta"):
        model = kind(**(values | small))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if side:
        assert shapes["pos_embed.pos_embed"] == (1, 64, config.width)
        shapes["pos_embed.pos_embed"] = (1, side**2, config.width)
    return shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_diffusers_is_consumed_exactly_once(oracle: Any, name: str) -> None:
    config = CONFIGS[name]
    expected = diffusers_shapes(config)
    consumed = Counter(name for entry in torch_names.base_entries(config) for name in entry.names)
    assert set(consumed.values()) == {1}
    assert torch_shapes(config) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_made_of_what_fills_it(name: str) -> None:
    entries = torch_names.base_entries(CONFIGS[name])
    names = [name for entry in entries for name in entry.names]
    assert len(names) == len(set(names))
    for entry in entries:
        assert math.prod(entry.shape) == len(entry.names) * math.prod(entry.torch_shape), entry.path
        assert len(entry.names) == (entry.shape[0] if entry.stacked else 1)


def test_sizes_of_the_real_networks() -> None:
    def count(config: Config) -> int:
        shapes = torch_shapes(config)
        return sum(math.prod(shape) for name, shape in shapes.items() if name != "pos_embed.pos_embed")

    assert count(MMDiTConfig.sd3_medium()) == 2_028_328_000
    assert count(VAEConfig.sd3()) == 83_819_683
    # Per block: two RMS norms on each stream, but for the last one all dual blocks come before it.
    extra = count(SD35_MEDIUM) - count(MMDiTConfig.sd3_medium())
    width = 1536
    dual = 13 * (4 * (width**2 + width) + 3 * (width**2 + width) + 2 * 64)
    assert extra == dual + 24 * 4 * 64


def test_stacked_layers_keep_their_order() -> None:
    config = CONFIGS["tiny SD3.5"]
    entries = {entry.path: entry for entry in torch_names.base_entries(config)}
    for run, layers in enumerate(([0, 1], [2, 3], [4])):
        names = entries[f"blocks_{run}/ff/net_2/kernel"].names
        assert list(names) == [f"transformer_blocks.{layer}.ff.net.2.weight" for layer in layers]


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["tiny", "tiny SD3.5", "tiny VAE"])
def test_round_trip_is_exact(name: str, dtype: Any) -> None:
    config = CONFIGS[name]
    tensors = {name: array.astype(dtype) for name, array in random_tensors(config).items()}
    read = dict(torch_names.read_base(MemoryReader(tensors), config))
    assert {array.dtype for array in read.values()} == {np.dtype(dtype)}
    back = dict(torch_names.write_base(torch_names.to_tree(read.items()), config))
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name


def test_layouts_are_as_torch_computes() -> None:
    """One tensor of each layout, indexed by hand."""
    config = CONFIGS["tiny"]
    tensors = random_tensors(config)
    read = dict(torch_names.read_base(MemoryReader(tensors), config))
    linear = tensors["transformer_blocks.1.ff.net.2.weight"]
    assert read["blocks_0/ff/net_2/kernel"][1, 200, 7] == linear[7, 200]
    patch, kernel = tensors["pos_embed.proj.weight"], read["pos_embed/proj/kernel"]
    assert kernel[(1 * 2 + 0) * 16 + 5, 33] == patch[33, 5, 1, 0]
    assert read["pos_embed/table"][3, 40, 9] == tensors["pos_embed.pos_embed"][0, 3 * 48 + 40, 9]
    vae = CONFIGS["tiny VAE"]
    tensors = random_tensors(vae)
    read = dict(torch_names.read_base(MemoryReader(tensors), vae))
    conv = tensors["encoder.down_blocks.1.downsamplers.0.conv.weight"]
    assert read["encoder/down_blocks_1/downsamplers_0/conv/kernel"][0, 2, 4, 11] == conv[11, 4, 0, 2]


def test_stored_dtypes_are_kept_and_mixed_ones_widened() -> None:
    """A stack of layers has one dtype: float32 where the file's layers differ, so nothing is lost."""
    config = CONFIGS["tiny"]
    tensors = random_tensors(config)
    mixed = "transformer_blocks.{}.attn.to_q.weight"
    for name in tensors:
        tensors[name] = tensors[name].astype(np.float16)
    tensors[mixed.format(1)] = tensors[mixed.format(1)].astype(ml_dtypes.bfloat16)
    tensors["proj_out.bias"] = tensors["proj_out.bias"].astype(np.float32)
    reader = MemoryReader(tensors)
    read = dict(torch_names.read_base(reader, config))
    wide = {path for path, array in read.items() if array.dtype != np.float16}
    assert wide == {"blocks_0/attn/to_q/kernel", "proj_out/bias"}
    for layer in (0, 1):
        expected = tensors[mixed.format(layer)].astype(np.float32).T
        np.testing.assert_array_equal(read["blocks_0/attn/to_q/kernel"][layer], expected)
    specs = torch_names.base_specs(reader, config)
    assert {path: (a.shape, a.dtype) for path, a in read.items()} == {p: tuple(s) for p, s in specs.items()}


# --- errors ---------------------------------------------------------------------------------------


def test_every_offender_is_named_at_once() -> None:
    config = CONFIGS["tiny"]
    tensors = random_tensors(config)
    del tensors["proj_out.bias"], tensors["transformer_blocks.1.ff.net.2.weight"]
    tensors["transformer_blocks.3.ff.net.2.weight"] = np.zeros((64, 256), np.float32)
    tensors["foreign"] = np.zeros(3, np.float32)
    tensors["context_embedder.weight"] = np.zeros((64, 49), np.float32)
    tensors["transformer_blocks.2.attn.to_q.weight"] = np.zeros((64,), np.float32)
    with pytest.raises(UserError) as caught:
        torch_names.read_base(MemoryReader(tensors, source="some.safetensors"), config)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("some.safetensors: ")
    assert sorted(line.strip() for line in lines[1:]) == sorted(
        [
            "missing: proj_out.bias",
            "missing: transformer_blocks.1.ff.net.2.weight",
            "unexpected: transformer_blocks.3.ff.net.2.weight",
            "unexpected: foreign",
            "wrong shape: context_embedder.weight is (64, 49), expected (64, 48)",
            "wrong shape: transformer_blocks.2.attn.to_q.weight is (64,), expected (64, 64)",
        ]
    )


def test_a_tensor_in_another_layout_of_the_same_size_is_refused() -> None:
    config = CONFIGS["tiny"]
    tensors = random_tensors(config)
    tensors["context_embedder.weight"] = tensors["context_embedder.weight"].T
    with pytest.raises(UserError, match=r"context_embedder.weight is \(48, 64\), expected \(64, 48\)"):
        torch_names.check_base_tensors(MemoryReader(tensors), config)


def test_another_kind_of_checkpoint_is_recognised() -> None:
    with pytest.raises(UserError, match=r"not one tensor belongs .*another kind of checkpoint"):
        torch_names.check_base_tensors(MemoryReader(random_tensors(CONFIGS["tiny VAE"])), CONFIGS["tiny"])


# --- adapters -------------------------------------------------------------------------------------


def student_tensors(rank: int = 3) -> dict[str, np.ndarray]:
    config = CONFIGS["tiny"]
    return torch_names.write_lora(random_lora(config, lora.STUDENT_TARGETS, rank), config)


def read_lora(tensors: dict[str, np.ndarray], name: str = "tiny") -> Any:
    reader = MemoryReader(tensors, "some.safetensors")
    return lora_files.read_lora(reader, CONFIGS[name]).tree


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("tiny", lora.STUDENT_TARGETS),
        ("tiny SD3.5", lora.STUDENT_TARGETS),
        ("tiny SD3.5", lora.AUXILIARY_TARGETS),
        ("tiny VAE", lora.VAE_ENCODER_TARGETS),
    ],
)
def test_adapter_round_trip_is_exact(name: str, targets: tuple[str, ...]) -> None:
    adapter = random_lora(CONFIGS[name], targets, rank=3)
    tensors = torch_names.write_lora(adapter, CONFIGS[name])
    expected, back = leaves(adapter), leaves(read_lora(tensors, name))
    assert back.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(back[path], leaf)


def test_adapter_names_and_layouts_are_pefts(oracle: Any) -> None:
    """Read, written again: PEFT's own tensors, names, shapes and bits."""
    for model, add in (
        (oracle.tiny_transformer(1, qk_norm="rms_norm", dual_attention_layers=(0,)), oracle.add_student_lora),
        (oracle.tiny_vae(1), oracle.add_vae_lora),
    ):
        add(model, rank=3, seed=2)
        state = arrays(oracle.lora_state(model))
        tensors = {oracle.LORA_PREFIX + name: array for name, array in state.items()}
        reader, config = MemoryReader(tensors), config_of(model)
        back = torch_names.write_lora(lora_files.read_lora(reader, config).tree, config)
        assert back.keys() == tensors.keys()
        for name, array in tensors.items():
            assert back[name].shape == array.shape and back[name].tobytes() == array.tobytes(), name


def test_ranks_may_differ_between_modules() -> None:
    tensors = student_tensors(3)
    other = student_tensors(5)
    names = [name for name in tensors if ".attn.to_q." in name]
    adapter = read_lora(tensors | {name: other[name] for name in names})
    assert {module: rank for module, rank in lora.modules(adapter).items() if rank != 3} == {
        "blocks_0/attn/to_q": 5,
        "blocks_1/attn/to_q": 5,
    }


Q1 = "transformer.transformer_blocks.1.attn.to_q"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t | {"foreign.weight": np.zeros(3, np.float32)}, ["foreign.weight"]),
        (
            lambda t: t | {f"{Q1}.alpha": np.zeros((), np.float32)},
            ["expected an .alpha for every module or for none"],
        ),
        (lambda t: {}, ["no tensors"]),
        (
            lambda t: {n: a for n, a in t.items() if n != f"{Q1}.lora_B.weight"},
            ["missing: transformer_blocks.1.attn.to_q.lora_B.weight"],
        ),
        (
            lambda t: {n: a for n, a in t.items() if n != "transformer.proj_out.lora_A.weight"},
            ["missing: proj_out.lora_A.weight"],
        ),
        (
            lambda t: t | {f"{Q1}.lora_A.weight": np.zeros((5, 64), np.float32)},
            ["transformer_blocks.1.attn.to_q.lora_B.weight is (64, 3), expected (64, 5)"],
        ),
        (
            lambda t: t | {"transformer.nowhere.lora_A.weight": np.zeros((3, 4), np.float32)},
            ["unexpected: nowhere.lora_A.weight"],
        ),
        (
            lambda t: t | {"transformer.proj_out.lora_A.weight": np.zeros((3, 65), np.float32)},
            ["proj_out.lora_A.weight is (3, 65), expected (3, 64)"],
        ),
    ],
    ids=[
        "foreign",
        "alpha",
        "empty",
        "half stacked",
        "half",
        "rank",
        "module",
        "shape",
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(change: Any, named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_lora(change(student_tensors()))
    for name in ["some.safetensors", *named]:
        assert name in str(caught.value)


def test_adapter_of_another_base_is_refused() -> None:
    wide = MMDiTConfig.tiny(num_attention_heads=2, caption_projection_dim=32)
    with pytest.raises(
        UserError, match=r"transformer_blocks\.0\.attn\.add_k_proj\.lora_A\.weight is \(3, 64\), expected"
    ):
        lora_files.read_lora(MemoryReader(student_tensors()), wide)
    with pytest.raises(UserError, match="not one tensor belongs"):
        read_lora(student_tensors(), "tiny VAE")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda leaves: leaves.pop("proj_out/b"), "missing: proj_out/b"),
        (lambda leaves: leaves.update({"proj_out/c": np.zeros(3)}), "unexpected: proj_out/c"),
        (
            lambda leaves: leaves.update({"proj_out/b": np.zeros((4, 64))}),
            "proj_out/b is (4, 64), expected (3, 64)",
        ),
        (lambda leaves: leaves.update({"nowhere/a": np.zeros((4, 64))}), "unexpected: nowhere/a"),
        (
            lambda leaves: leaves.update({"blocks_0/attn/to_q/a": np.zeros((3, 64, 3))}),
            "blocks_0/attn/to_q/a is (3, 64, 3), expected (2, 64, 3)",
        ),
    ],
    ids=["half", "leaf", "rank", "module", "layers"],
)
def test_own_adapters_that_do_not_fit_are_refused_by_name(change: Any, named: str) -> None:
    pairs = leaves(random_lora(CONFIGS["tiny"], lora.STUDENT_TARGETS, rank=3))
    lora_files.check_own(MemoryReader(pairs), CONFIGS["tiny"])
    change(pairs)
    with pytest.raises(UserError, match=re.escape(named)):
        lora_files.check_own(MemoryReader(pairs), CONFIGS["tiny"])


@pytest.mark.parametrize("shape", [(300, 129), (1, 500), (128, 256), (7,), (3, 3, 140, 5)])
def test_transposed_copies(shape: tuple[int, ...]) -> None:
    """Whole tiles, parts of tiles, and what is no matrix."""
    source = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    target = np.empty(shape[::-1], np.float16)
    torch_names.copy_into(target, source.T)
    np.testing.assert_array_equal(target, source.T.astype(np.float16))
