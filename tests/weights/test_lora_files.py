"""LoRA files of others: names, strengths, parts of a network; PEFT's merged weights decide.

Without torch: what each name means and what is refused. With it: PEFT's own adapters, written as PEFT, diffusers and
others write them, through the reader and through every command that has one.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from parity import MemoryReader, error, leaves, random_lora
from tiny_checkpoint import random_params, save_network, save_peft, tiny_mmdit_config, tiny_vae_config
from tsdsr_jax.commands import convert_lora, convert_sd3
from tsdsr_jax.distillation import adapters
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.pretraining.teacher_weights import load_starting_lora
from tsdsr_jax.upscaling.loading import load_loras
from tsdsr_jax.weights.lora_files import (
    LORA_FORMAT,
    check_rank,
    check_start,
    idle_modules,
    load_lora,
    open_lora,
    read_lora,
    save_lora,
)
from tsdsr_jax.weights.lora_scaling import METADATA_KEY
from tsdsr_jax.weights.sd3_folder import NetworkFiles
from tsdsr_jax.weights.tensor_files import open_tensors, save_tensors
from tsdsr_jax.weights.torch_names import base_entries, write_lora

pytest_plugins = "parity"

# float32 rounds A·B and its sum with a kernel of about its size some ten times, at 6e-8 each.
TOLERANCE = 1e-6
CONFIG = MMDiTConfig.tiny()
Q1 = "transformer_blocks.1.attn.to_q"


def tensors(rank: int = 4, targets: tuple[str, ...] = lora.STUDENT_TARGETS) -> dict[str, np.ndarray]:
    return write_lora(random_lora(CONFIG, targets, rank), CONFIG)


def renamed(named: Mapping[str, np.ndarray], *changes: tuple[str, str]) -> dict[str, np.ndarray]:
    named = dict(named)
    for pattern, replacement in changes:
        named = {re.sub(pattern, replacement, name): array for name, array in named.items()}
    return named


def read(
    named: Mapping[str, np.ndarray], config: dict[str, Any] | str | None = None, prefix: str = ""
) -> Any:
    """Through the reader; `config` goes into the metadata, its keys after `prefix`."""
    if isinstance(config, dict):
        config = json.dumps({prefix + key: value for key, value in config.items()})
    return read_lora(
        MemoryReader(named, "some.safetensors", {METADATA_KEY: config} if config else {}), CONFIG
    )


def assert_same(ours: Any, theirs: Any) -> None:
    ours, theirs = leaves(ours), leaves(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype and ours[path].tobytes() == leaf.tobytes(), path


def product(tree: Any, module: str, layer: int | None = None) -> np.ndarray:
    a, b = (np.asarray(leaves(tree)[f"{module}/{half}"], np.float64) for half in "ab")
    return a @ b if layer is None else a[layer] @ b[layer]


# --- names -------------------------------------------------------------------------------------------

NAMES = {
    "none": ((r"^transformer\.", ""),),
    "peft": ((r"^transformer\.", "base_model.model."),),
    "peft around a pipeline": ((r"^", "base_model.model."),),
    "default": ((r"\.weight$", ".default.weight"),),
    "down and up": (("lora_A", "lora_down"), ("lora_B", "lora_up")),
    "down and up, without prefix": ((r"^transformer\.", ""), ("lora_A", "lora_down"), ("lora_B", "lora_up")),
}


@pytest.mark.parametrize("changes", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_kind_of_name_gives_the_same_bits(changes: Any, dtype: type) -> None:
    plain = {name: array.astype(dtype) for name, array in tensors().items()}
    assert_same(read(renamed(plain, *changes)).tree, read(plain).tree)


def as_kohya(named: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Underscores for the dots in modules; `.lora_down.weight`, `.lora_up.weight` and `.alpha` stay."""

    def rename(name: str) -> str:
        module, dot, rest = re.split(r"(\.)(?=lora_|alpha)", name.removeprefix("transformer."), maxsplit=1)
        rest = rest.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        return f"{prefix}{module.replace('.', '_')}{dot}{rest}"

    return {rename(name): array for name, array in named.items()}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_"])
def test_kohyas_names_of_diffusers_modules_are_read(prefix: str) -> None:
    some = {name: array for name, array in tensors().items() if ".1." in name or "proj_out" in name}
    assert_same(read(as_kohya(some, prefix)).tree, read(some).tree)
    adapter = read(as_kohya(some | alphas(some, 2), prefix))
    assert adapter.factors == (0.5,)
    assert_same(adapter.tree, lora.scale(read(some).tree, np.float32(0.5)))


OTHERS = {
    "kohya's, of Stability's modules": (
        (r"^transformer\.transformer_blocks\.", "lora_unet_joint_blocks_"),
        "kohya",
    ),
    "kohya's, of another network": ((r"^transformer\.", "lora_unet_other_"), "kohya"),
    "text encoder": ((r"^transformer\.", "text_encoder."), "text encoders"),
    "ComfyUI": ((r"^transformer\.", "diffusion_model."), "ComfyUI"),
    "LoKr": ((r"lora_A\.weight", "lokr_w1"), "LoKr"),
    "LoHa": ((r"lora_A\.weight", "hada_w1_a"), "LoHa"),
    "older diffusers": ((r"lora_A\.weight", "lora.down.weight"), "older names"),
    "another adapter": ((r"\.weight$", ".second.weight"), "not a LoRA for this network"),
}


@pytest.mark.parametrize(("change", "kind"), OTHERS.values(), ids=OTHERS)
def test_other_kinds_are_called_by_name_with_three_examples(change: tuple[str, str], kind: str) -> None:
    named = renamed(tensors(), change)
    with pytest.raises(UserError) as caught:
        read(named)
    said = str(caught.value)
    assert said.startswith("some.safetensors: ") and kind in said and "\n" not in said
    assert sum(name in said for name in named) == 3 and re.search(r"and \d+ more$", said)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"transformer.{Q1}.lora_magnitude_vector.weight", "DoRA"),
        (f"transformer.{Q1}.dora_scale", "DoRA"),
        (f"transformer.{Q1}.lora_B.bias", "lora_bias"),
        (f"transformer.{Q1}.bias", "not a LoRA"),
        ("foreign", "not a LoRA"),
    ],
)
def test_one_tensor_more_is_named(name: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"{kind}.*{re.escape(name)}$"):
        read(tensors() | {name: np.zeros(64, np.float32)})


def test_a_lora_for_a_larger_network_is_named_in_a_few_lines() -> None:
    named = tensors()
    for block in range(90):
        for half in "AB":
            name = f"transformer.transformer_blocks.{9 + block}.attn.to_q.lora_{half}.weight"
            named[name] = named[f"transformer.{Q1}.lora_{half}.weight"]
    with pytest.raises(UserError, match=r"\(180 unexpected\)") as caught:
        read(named)
    said = str(caught.value).splitlines()
    assert len(said) == 5 and "blocks.9.attn.to_q.lora_A" in said[1] and said[-1] == "  and 177 more"


def test_two_names_for_one_tensor_are_refused() -> None:
    with pytest.raises(
        UserError, match=rf"transformer\.{Q1}\.lora_A\.weight and {Q1}\.lora_A\.weight mean the same"
    ):
        read(tensors() | {f"{Q1}.lora_A.weight": np.zeros((4, 64), np.float32)})


# --- strength ----------------------------------------------------------------------------------------


def config(**changes: object) -> dict[str, Any]:
    """What PEFT writes for a plain LoRA of rank 4."""
    return {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": "sd3", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": "gaussian", "kasa_config": None, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 4, "lora_bias": False, "lora_dropout": 0.1,
        "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
        "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4,
        "rank_pattern": {}, "revision": None, "target_modules": ["to_q"], "target_parameters": None, "task_type": None,
        "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
        "use_rslora": False, "velora_config": None,
    } | changes  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_factor_of_one_changes_no_bit(prefix: str) -> None:
    half = {name: array.astype(np.float16) for name, array in tensors().items()}
    plain = read(half)
    assert plain.factors == (1.0,) and plain.filled == ()
    assert_same(read(half, config(), prefix).tree, plain.tree)
    rooted = read(half, config(lora_alpha=2, use_rslora=True), prefix)  # 2 / √4
    assert_same(rooted.tree, plain.tree)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 1}, 0.25),
        ({"lora_alpha": 6.5}, 1.625),
        ({"lora_alpha": 3, "use_rslora": True}, 1.5),
    ],
)
def test_a_factor_is_folded_into_b_in_float32(changes: dict[str, Any], factor: float, prefix: str) -> None:
    half = {name: array.astype(np.float16) for name, array in tensors().items()}
    plain, folded = read(half), read(half, config(**changes), prefix)
    assert folded.factors == (factor,)
    for path, leaf in leaves(plain.tree).items():
        wanted = leaf.astype(np.float32) * np.float32(factor) if path.endswith("/b") else leaf
        assert leaves(folded.tree)[path].dtype == wanted.dtype
        np.testing.assert_array_equal(leaves(folded.tree)[path], wanted)


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("to_q", {"blocks_0/attn/to_q": (0, 1), "blocks_1/attn/to_q": (0,)}),
        (Q1, {"blocks_0/attn/to_q": (1,)}),
        (f"^{Q1}", {"blocks_0/attn/to_q": (1,)}),
        ("^to_q", {}),
        ("o_q", {}),
        (r"transformer_blocks\.[01]\.attn\.to_q", {"blocks_0/attn/to_q": (0, 1)}),
        (f"transformer.{Q1}", {}),
        ("proj", {"pos_embed/proj": (None,), "blocks_0/ff/net_0/proj": (0, 1), "blocks_1/ff/net_0/proj": (0,),
                  "blocks_0/ff_context/net_0/proj": (0, 1)}),
    ],
)  # fmt: skip
def test_patterns_match_whole_names_or_their_ends(pattern: str, hits: dict[str, tuple[int, ...]]) -> None:
    plain, adapter = read(tensors()), read(tensors(), config(alpha_pattern={pattern: 12}))
    for module in lora.modules(plain.tree):
        layers = range(len(leaves(plain.tree)[f"{module}/a"])) if module.startswith("blocks_") else [None]
        for layer in layers:
            factor = 3 if layer in hits.get(module, ()) else 1
            ours, theirs = (product(tree, module, layer) for tree in (adapter.tree, plain.tree))
            assert error(ours, factor * theirs) <= TOLERANCE, (module, layer)


def test_pefts_patterns_see_the_pipelines_names_below_its_own() -> None:
    named = renamed(tensors(), *NAMES["peft around a pipeline"])
    assert read(named, config(alpha_pattern={f"^transformer.{Q1}": 12})).factors == (1.0, 3.0)
    assert read(named, config(alpha_pattern={f"^{Q1}": 12})).factors == (1.0,)


def test_the_first_pattern_wins() -> None:
    assert read(tensors(), config(lora_alpha=8, alpha_pattern={"to_q": 16, Q1: 4})).factors == (2.0, 4.0)
    assert read(tensors(), config(lora_alpha=8, alpha_pattern={Q1: 4, "to_q": 16})).factors == (1.0, 2.0, 4.0)


def alphas(named: Mapping[str, np.ndarray], value: object, dtype: type = np.float32) -> dict[str, np.ndarray]:
    names = [name for name in named if "lora_A" in name or "lora_down" in name]
    return {re.sub(r"\.lora_(A|down).*", ".alpha", name): np.array(value, dtype) for name in names}


@pytest.mark.parametrize("changes", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_alpha_tensors(changes: Any, dtype: type) -> None:
    named = renamed(tensors(), *changes)
    adapter = read(named | alphas(named, 2, dtype))
    assert adapter.factors == (0.5,)
    assert_same(adapter.tree, lora.scale(read(tensors()).tree, np.float32(0.5)))


def test_alpha_tensors_one_by_one() -> None:
    """Each layer of a run has its own; arrays of one number count, too."""
    named = tensors() | alphas(tensors(), 4) | {f"transformer.{Q1}.alpha": np.array([6], np.float32)}
    plain, adapter = read(tensors()), read(named)
    assert adapter.factors == (1.0, 1.5)
    for layer, factor in enumerate([1, 1.5]):
        ours, theirs = (product(tree, "blocks_0/attn/to_q", layer) for tree in (adapter.tree, plain.tree))
        assert error(ours, factor * theirs) <= TOLERANCE


def test_places_that_agree() -> None:
    assert read(tensors() | alphas(tensors(), 8), config(lora_alpha=8)).factors == (2.0,)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "MiCA"])
def test_beginnings_that_leave_the_base_alone(init: object) -> None:
    read(tensors(), config(init_lora_weights=init))


def test_settings_of_training_say_nothing_about_the_values() -> None:
    read(
        tensors(),
        config(layers_to_transform=[0, 1], exclude_modules=["x"], velora_config={"a": 1}, future=None),
    )


REFUSED = {
    **{f"init {init}": ({"init_lora_weights": init}, f"init_lora_weights = {init}")
       for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "next_year")},
    "DoRA": ({"use_dora": True}, "use_dora"),
    "bias": ({"lora_bias": True}, "lora_bias"),
    "biases": ({"bias": "all"}, "bias = all"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "modules": ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    "aLoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "KaSA": ({"kasa_config": {"a": 1}}, "kasa_config"),
    "BD-LoRA": ({"use_bdlora": {"a": 1}}, "use_bdlora"),
    "arrow": ({"arrow_config": {"a": 1}}, "arrow_config"),
    "Monte Carlo": ({"monteclora_config": {"a": 1}}, "monteclora_config"),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    "another type": ({"peft_type": "LOHA"}, "peft_type = LOHA"),
    "future": ({"times_three": 1}, "times_three = 1"),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_product_is_refused_by_name(changes: dict[str, Any], named: str, prefix: str) -> None:
    with pytest.raises(
        UserError, match=rf"^some\.safetensors: {METADATA_KEY}: has {re.escape(named)}"
    ) as caught:
        read(tensors(), config(**changes), prefix)
    assert "\n" not in str(caught.value)


WRONG = {
    "rank": ({"r": 8}, "says rank 8 for .*, whose tensors have 4"),
    "rank of one": ({"rank_pattern": {Q1: 2}}, rf"says rank 2 for {Q1}, whose tensors have 4"),
    **{f"alpha {value}": ({"lora_alpha": value}, "lora_alpha is .*; expected a number above 0")
       for value in (0, -4, math.nan, math.inf, "8", None, True, [8], 10**400)},
    "no rank": ({"r": None}, "r is None; expected a number"),
    "alpha of one": ({"alpha_pattern": {Q1: -1}}, r"alpha_pattern\['transformer_blocks.*'\] is -1"),
    "patterns": ({"alpha_pattern": [3]}, "alpha_pattern is .*; expected an object"),
    "no pattern": ({"rank_pattern": {"to_(q": 4}}, r"rank_pattern has 'to_\(q', not a pattern"),
    "rslora": ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_descriptions_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tensors(), config(**changes))
    assert str(caught.value).startswith("some.safetensors: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": 4,', "not readable JSON"),
        ("[4]", "expected a JSON object, found a list"),
        (
            '{"transformer.r": 4, "transformer.lora_alpha": 4, "text_encoder.r": 4}',
            "more than the transformer's LoRA",
        ),
        ('{"lora_alpha": 4}', "r is None"),
    ],
)
def test_damaged_metadata(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tensors(), text)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, [1, 2]])
def test_alpha_tensors_that_are_no_alphas(value: object) -> None:
    with pytest.raises(UserError, match=r"\.alpha is .*; expected (a number above 0|one number)"):
        read(tensors() | alphas(tensors(), value))


def test_alpha_tensors_for_a_part_or_for_nothing() -> None:
    some = alphas(tensors(), 4)
    some.pop(f"transformer.{Q1}.alpha")
    with pytest.raises(
        UserError, match=rf"for every module or for none; without one: {Q1}; without a module: none"
    ):
        read(tensors() | some)
    with pytest.raises(UserError, match=r"without a module: transformer\.x\.alpha"):
        read(tensors() | alphas(tensors(), 4) | {"transformer.x.alpha": np.ones(())})


def test_places_that_contradict_each_other() -> None:
    with pytest.raises(
        UserError, match=r"two factors for .*: 2 from .*metadata, 0\.5 from its \.alpha tensors"
    ):
        read(tensors() | alphas(tensors(), 2), config(lora_alpha=8))


def test_pefts_own_folder(tmp_path: Path) -> None:
    """Its tensors lie in adapter_model.safetensors, their strength in adapter_config.json."""
    file = tmp_path / "adapter_model.safetensors"
    save_tensors(file, renamed(tensors(), *NAMES["peft"]), {"format": "pt"})
    assert open_lora(file, CONFIG).factors == (1.0,)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config(lora_alpha=8)))
    assert open_lora(file, CONFIG).factors == (2.0,)
    file.rename(tmp_path / "transformer.safetensors")
    assert open_lora(tmp_path / "transformer.safetensors", CONFIG).factors == (2.0,)
    save_tensors(tmp_path / "plain.safetensors", tensors(), {"format": "pt"})
    assert open_lora(tmp_path / "plain.safetensors", CONFIG).factors == (1.0,)
    # Of two files with PEFT's names it describes one, and nothing says which.
    with pytest.raises(UserError, match=r"may describe transformer\.safetensors or plain\.safetensors"):
        open_lora(tmp_path / "transformer.safetensors", CONFIG)
    (tmp_path / "plain.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: not readable JSON"):
        open_lora(tmp_path / "transformer.safetensors", CONFIG)


# --- some layers, several ranks ----------------------------------------------------------------------


def test_layers_without_a_pair_get_zeros() -> None:
    some = {name: array for name, array in tensors().items() if "_blocks.0." in name}
    adapter = read(some)
    assert set(adapter.filled) == set(lora.modules(adapter.tree)) and len(adapter.filled) > 5
    plain = leaves(read(tensors()).tree)
    for path, leaf in leaves(adapter.tree).items():
        np.testing.assert_array_equal(leaf[0], plain[path][0])
        assert not leaf[1].any()


def test_ranks_that_differ_between_layers() -> None:
    other = {name: array for name, array in tensors(6).items() if Q1 in name}
    adapter = read(tensors() | other, config(rank_pattern={Q1: 6}, lora_alpha=12))
    assert adapter.filled == ("blocks_0/attn/to_q",) and adapter.factors == (2.0, 3.0)
    assert lora.modules(adapter.tree)["blocks_0/attn/to_q"] == 6
    for layer, (named, factor) in enumerate([(tensors(), 3), (tensors(6), 2)]):
        wanted = factor * product(read(named).tree, "blocks_0/attn/to_q", layer)
        assert error(product(adapter.tree, "blocks_0/attn/to_q", layer), wanted) <= TOLERANCE
    check_rank(adapter.tree, 6, Path("x"), "--rank")
    with pytest.raises(
        UserError, match=r"rank 6 in blocks_0/attn/to_q, the largest of its ranks, .*; pass --rank 6"
    ):
        check_rank(adapter.tree, 4, Path("x"), "--rank")


def test_training_begins_from_whole_pairs_of_one_rank() -> None:
    whole = read(tensors()).tree
    check_start(whole, whole, Path("x"))
    assert idle_modules(whole) == [] and idle_modules(lora.scale(whole, 0)) == []
    ends = {name: array for name, array in tensors().items() if "to_q" not in name}
    with pytest.raises(
        UserError, match=r"does not adapt the modules .*missing: blocks_0/attn/to_q, blocks_1/attn/to_q"
    ):
        check_start(read(ends).tree, whole, Path("x"))
    part = {name: array for name, array in tensors().items() if Q1 not in name}
    with pytest.raises(
        UserError, match=r"only some layers of blocks_0/attn/to_q, .*; training could not reach"
    ):
        check_start(read(part).tree, whole, Path("x"))
    mixed = read(tensors() | {n: array for n, array in tensors(6).items() if "to_q" in n}).tree
    with pytest.raises(UserError, match=r"one rank for all modules; different in blocks_0/attn/to_q \(6\)"):
        check_start(mixed, whole, Path("x"))


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float, own: bool) -> None:
    named, file = tensors(), tmp_path / "x.safetensors"
    named[f"transformer.{Q1}.lora_B.weight"][0, 1] = value
    if own:
        tree = read(tensors()).tree
        tree["blocks_0"]["attn"]["to_q"]["b"][1, 0, 1] = value
        save_lora(file, tree, "transformer")
    else:
        save_tensors(file, named)
    name = "blocks_0/attn/to_q/b" if own else f"transformer.{Q1}.lora_B.weight"
    with pytest.raises(
        UserError, match=rf"x\.safetensors: has values .* infinite in 1 tensor: {re.escape(name)};"
    ):
        load_lora(file, CONFIG)


def test_all_tensors_that_are_not_finite_are_named_and_counted() -> None:
    named = tensors()
    for name in (f"transformer.{Q1}.lora_A.weight", "transformer.proj_out.lora_B.weight"):
        named[name][0, 0] = math.inf
    with pytest.raises(
        UserError, match=rf"in 2 tensors: transformer\.{Q1}\.lora_A\.weight, transformer\.proj_out\.lora_B"
    ):
        read(named)
    every = {name: np.full_like(array, math.nan) for name, array in named.items()}
    with pytest.raises(UserError, match=rf"in {len(every)} tensors: .* and {len(every) - 10} more;"):
        read(every)


@pytest.mark.parametrize("changes", NAMES.values(), ids=NAMES)
def test_names_of_an_autoencoders_lora(tmp_path: Path, changes: Any) -> None:
    network = VAEConfig.tiny()
    named = write_lora(random_lora(network, lora.VAE_ENCODER_TARGETS, 3), network)
    save_tensors(tmp_path / "plain.safetensors", named)
    save_tensors(tmp_path / "vae.safetensors", renamed(named | alphas(named, 6), *changes))
    adapter = open_lora(tmp_path / "vae.safetensors", network)
    assert adapter.factors == (2.0,)
    assert_same(adapter.tree, lora.scale(load_lora(tmp_path / "plain.safetensors", network), np.float32(2)))


def test_a_factor_beyond_float32_is_refused() -> None:
    with pytest.raises(UserError, match="infinite in"):
        read({name: array * 100 for name, array in tensors().items()}, config(lora_alpha=1e38))


# --- PEFT decides ------------------------------------------------------------------------------------

PATTERNS = dict(
    rank_pattern={
        "^transformer_blocks.0.attn.to_q": 2,
        "to_k": 6,
        r"transformer_blocks\.[12]\.ff\.net\.0\.proj": 3,
    },
    alpha_pattern={"to_q": 5, "^transformer_blocks.2.attn.to_v": 1, "proj_out": 16, "linear": 7},
)
STRENGTHS = {
    "alpha 8": dict(r=4, lora_alpha=8),
    "alpha 1": dict(r=4, lora_alpha=1),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True),
    "patterns": dict(r=4, lora_alpha=6, **PATTERNS),
    "patterns, rslora": dict(r=4, lora_alpha=6, use_rslora=True, **PATTERNS),
    "some blocks": dict(r=4, lora_alpha=8, layers_to_transform=[0, 2], layers_pattern="transformer_blocks"),
}


def adapted(oracle: Any, part: str = "transformer", **settings: Any) -> Any:
    """A network with a random adapter of PEFT's."""
    import torch
    from peft import LoraConfig

    model = oracle.tiny_transformer(1) if part == "transformer" else oracle.tiny_vae(2)
    targets = list(oracle.STUDENT_TARGETS) if part == "transformer" else oracle.VAE_TARGETS
    if "layers_to_transform" in settings:
        targets = [target for target in targets if target not in ("proj_out",)]
    model.add_adapter(LoraConfig(target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def merged_by_peft(model: Any) -> dict[str, np.ndarray]:
    """torch's names -> weights, after PEFT's own merge."""
    model.fuse_lora()
    state = {
        name.replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def base_of(oracle: Any, folder: Path) -> Path:
    oracle.save_diffusers_folder(folder, oracle.tiny_transformer(1), oracle.tiny_vae(2))
    return folder


def save_adapter(oracle: Any, model: Any, path: Path, changes: Any = (), with_alphas: bool = False) -> None:
    """As diffusers does, with its metadata; or with .alpha tensors instead of that, under other names."""
    state = {f"transformer.{name}": tensor.numpy() for name, tensor in oracle.lora_state(model).items()}
    settings = {
        f"transformer.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }
    metadata = {METADATA_KEY: json.dumps(settings, sort_keys=True), "format": "pt"}
    if with_alphas:
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_alpha")}
        for name, layer in layers.items():
            state[f"transformer.{name}.alpha"] = np.array(layer.lora_alpha["default"], np.float32)
        metadata = {}
    save_tensors(path, renamed(state, *changes), metadata)


def assert_merged(network: NetworkFiles, adapter: Any, expected: Mapping[str, np.ndarray]) -> None:
    """Our weights with the adapter merged in, against PEFT's, tensor by tensor."""
    held = leaves(network.load(jnp.float32, adapter))
    for entry in base_entries(network.config):
        for name, tensor in entry.scatter(np.asarray(held[entry.path])):
            difference = np.abs(tensor - expected[name]).max() / np.abs(expected[name]).max()
            assert difference <= TOLERANCE, (name, difference)


@pytest.mark.parametrize("settings", STRENGTHS.values(), ids=STRENGTHS)
def test_pefts_strengths_through_the_reader(oracle: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    base, model = base_of(oracle, tmp_path / "sd3"), adapted(oracle, **settings)
    save_adapter(oracle, model, tmp_path / "x.safetensors")
    network = NetworkFiles(base / "transformer", "transformer")
    adapter = load_lora(tmp_path / "x.safetensors", network.config)
    assert_merged(network, adapter, merged_by_peft(model))


@pytest.mark.parametrize("changes", NAMES.values(), ids=NAMES)
def test_alpha_tensors_under_every_name_through_the_reader(oracle: Any, tmp_path: Path, changes: Any) -> None:
    base, model = base_of(oracle, tmp_path / "sd3"), adapted(oracle, r=4, lora_alpha=6, **PATTERNS)
    save_adapter(oracle, model, tmp_path / "x.safetensors", changes, with_alphas=True)
    network = NetworkFiles(base / "transformer", "transformer")
    assert_merged(network, load_lora(tmp_path / "x.safetensors", network.config), merged_by_peft(model))


def test_what_diffusers_and_peft_save_themselves(oracle: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model

    base, model = base_of(oracle, tmp_path / "sd3"), adapted(oracle, r=4, lora_alpha=8, **PATTERNS)
    network = NetworkFiles(base / "transformer", "transformer")
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=oracle.lora_state(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    model.save_lora_adapter(tmp_path / "alone")
    expected = merged_by_peft(model)
    for file in (tmp_path, tmp_path / "alone"):
        assert_merged(network, load_lora(file / "pytorch_lora_weights.safetensors", network.config), expected)

    wrapped = get_peft_model(
        oracle.tiny_transformer(1),
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(oracle.STUDENT_TARGETS),
            init_lora_weights=False,
            **PATTERNS,
        ),
    )
    wrapped.save_pretrained(tmp_path / "peft")
    adapter = load_lora(tmp_path / "peft" / "adapter_model.safetensors", network.config)
    state = wrapped.merge_and_unload().state_dict()
    assert_merged(network, adapter, {name: value.detach().numpy() for name, value in state.items()})


@pytest.fixture
def both(oracle: Any, tmp_path: Path) -> SimpleNamespace:
    """A model, `lora/` with adapters of both networks of alpha ≠ rank, and PEFT's merged weights."""
    models = {
        part: adapted(oracle, part, r=4, lora_alpha=alpha) for part, alpha in (("transformer", 8), ("vae", 3))
    }
    for part, model in models.items():
        save_adapter(oracle, model, tmp_path / "lora" / f"{part}.safetensors")
    base = base_of(oracle, tmp_path / "sd3")
    networks = {part: NetworkFiles(base / part, part) for part in models}
    return SimpleNamespace(
        base=base, lora=tmp_path / "lora", networks=networks,
        expected={part: merged_by_peft(model) for part, model in models.items()},
    )  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    script.main()


def test_upscaling_and_both_trainings_read_the_strength(both: SimpleNamespace) -> None:
    options = SimpleNamespace(lora_dir=str(both.lora), rank=4, rank_vae=4)
    networks = SimpleNamespace(**both.networks)
    student, auxiliary = adapters.load_adapters(both.lora, networks, adapters.Ranks(4, 4, 4))
    starts = dict(zip(both.networks, student, strict=True))
    for part, adapter in zip(
        both.networks, load_loras(options, *both.networks.values(), merged=()), strict=True
    ):
        assert_merged(both.networks[part], adapter, both.expected[part])
        assert_merged(both.networks[part], starts[part], both.expected[part])
    assert auxiliary is None
    start = load_starting_lora(both.lora / "transformer.safetensors", networks, rank=4)
    assert_merged(both.networks["transformer"], start, both.expected["transformer"])


def test_the_teacher_of_distilling_has_its_strength(both: SimpleNamespace) -> None:
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    networks = SimpleNamespace(transformer=both.networks["transformer"], mesh=mesh, dtype=jnp.float32)
    teacher, _ = adapters.load_teacher(both.lora / "transformer.safetensors", networks)
    assert_merged(both.networks["transformer"], teacher, both.expected["transformer"])


def test_converting_sd3_merges_with_the_strength(
    both: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, convert_sd3, "--input", both.base, "--output", tmp_path / "out", "--lora_dir", both.lora)
    for part, expected in both.expected.items():
        assert_merged(NetworkFiles(tmp_path / "out" / part, part), None, expected)


def test_converting_loras_keeps_the_strength_both_ways(
    both: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run(monkeypatch, convert_lora, "-i", both.lora, "-o", tmp_path / "ours", "--base", both.base)
    said = capsys.readouterr().out
    assert "rank 4, alpha/rank 2 folded in)" in said and "rank 4, alpha/rank 0.75 folded in)" in said
    run(monkeypatch, convert_lora, "-i", tmp_path / "ours", "-o", tmp_path / "back", "--base", both.base)
    assert "folded in" not in capsys.readouterr().out
    for part, expected in both.expected.items():
        for folder in ("ours", "back"):
            adapter = open_lora(tmp_path / folder / f"{part}.safetensors", both.networks[part].config)
            assert adapter.factors == (1.0,)
            assert_merged(both.networks[part], adapter.tree, expected)
    assert METADATA_KEY not in open_tensors(tmp_path / "back" / "vae.safetensors").metadata


def test_converting_says_what_it_filled_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    configs = {"transformer": tiny_mmdit_config(num_layers=3), "vae": tiny_vae_config()}
    for part, network in configs.items():
        save_network(tmp_path / "sd3" / part, network, random_params(network, 1))
    tree = random_lora(configs["transformer"], ("to_q",), 2)
    save_peft(tmp_path / "x.safetensors", tree, configs["transformer"])
    some = {
        name: array for name, array in read_file(tmp_path / "x.safetensors").items() if "_blocks.0." in name
    }
    save_tensors(tmp_path / "some.safetensors", some)
    run(
        monkeypatch,
        convert_lora,
        "-i",
        tmp_path / "some.safetensors",
        "-o",
        tmp_path / "out",
        "--base",
        tmp_path / "sd3",
    )
    assert "filled with zeros in 1 modules" in capsys.readouterr().out
    back = load_lora(tmp_path / "out" / "some.safetensors", configs["transformer"])
    assert idle_modules(back) == ["blocks_0/attn/to_q"]
    assert flatten_dict(back).keys() == {("blocks_0", "attn", "to_q", half) for half in "ab"}


def read_file(path: Path) -> dict[str, np.ndarray]:
    reader = open_tensors(path)
    return {name: reader.read(name) for name in reader.specs}


def test_files_say_what_they_are_in_the_words_of_earlier_versions():
    """What is written in users' files does not follow the code when that moves."""
    assert LORA_FORMAT == "tsdsr_jax.lora"
