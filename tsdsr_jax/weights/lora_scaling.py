"""The strength of a LoRA: the factor on each module's A·B, as PEFT computes it.

It follows from alpha, which diffusers stores in the file's metadata, PEFT in `adapter_config.json` beside the file, and
others in tensors named `MODULE.alpha`. Without any of these the factor is 1: alpha equals the rank, as in TSD-SR's files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tsdsr_jax.errors import UserError, listed
from tsdsr_jax.weights.lora_names import PEFT_PREFIX, Names
from tsdsr_jax.weights.sd3_folder import read_json
from tsdsr_jax.weights.tensor_files import TensorReader

METADATA_KEY = "lora_adapter_metadata"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST = 3e38  # about float32's

# Fields of PEFT 0.21's LoraConfig that determine the factors.
_USED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# Fields that do not change the result: where the adapter came from, its modules, its initialization and training.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config"),
    *("megatron_core", "qalora_group_size"),
}
_NEUTRAL = {"peft_type": "LORA", "bias": "none"}
# Initializations that do not change the base's weights, as PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do.
_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


class Told(NamedTuple):
    """The factors that one source gives, by module, and the name of the source for messages."""

    where: str
    factors: dict[str, float]


def scalings(reader: TensorReader, names: Names, ranks: Mapping[str, int]) -> dict[str, float]:
    """The factor of every module in `ranks`, which maps modules to their ranks.

    Raises:
      UserError: a description is damaged, does not fit the tensors, describes more than A·B, or contradicts another one.
    """
    told = [
        Told(where, _peft_factors(where, values, names.keys, ranks))
        for where, values in _descriptions(reader)
    ]
    if names.alphas:
        told.append(Told("its .alpha tensors", _alpha_factors(reader, names, ranks)))
    if not told:
        return dict.fromkeys(ranks, 1.0)
    for other in told[1:]:
        _refuse_contradiction(reader.source, told[0], other)
    return told[0].factors


def _refuse_contradiction(source: object, first: Told, second: Told) -> None:
    for module, factor in first.factors.items():
        if not math.isclose(factor, second.factors[module], rel_tol=1e-6):
            raise UserError(
                f"{source}: two factors for {module}: {factor:g} from {first.where}, {second.factors[module]:g} from "
                f"{second.where}; remove the wrong one"
            )


# --- PEFT's description -------------------------------------------------------------------------------


def _descriptions(reader: TensorReader) -> list[tuple[str, dict[str, Any]]]:
    """(place, LoraConfig's values) from the file's metadata and from `adapter_config.json`, if they exist."""
    found = []
    if METADATA_KEY in reader.metadata:
        where = f"{reader.source}: {METADATA_KEY}"
        found.append((where, _parsed(where, reader.metadata[METADATA_KEY])))
    if config := _config_beside(reader):
        found.append((str(config), read_json(config)))
    for where, values in found:
        _refuse_other_maths(where, values)
    return found


def _config_beside(reader: TensorReader) -> Path | None:
    """PEFT's description of this file; raises UserError if it may describe another file."""
    file, config = Path(reader.source), Path(reader.source).parent / PEFT_CONFIG
    if not config.is_file():
        return None
    if file.name == PEFT_FILE:
        return config
    if not any(name.startswith(PEFT_PREFIX) for name in reader.specs):
        return None
    others = sorted(path.name for path in file.parent.glob("*.safetensors") if path.name != file.name)
    if others:
        raise UserError(
            f"{config}: may describe {file.name} or {listed(others, 3)}; put each LoRA into a folder of its own and "
            "convert it with convert/lora.py"
        )
    return config


def _parsed(where: str, text: str) -> dict[str, Any]:
    """The metadata's values, with diffusers' "transformer." removed from each key."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not readable JSON ({error}); save the LoRA again") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object, found a {type(values).__name__}")
    prefixed = [key for key in values if key.startswith("transformer.")]
    if prefixed and len(prefixed) < len(values):
        others = [key for key in values if key not in prefixed]
        raise UserError(f"{where}: describes more than the transformer's LoRA: {listed(others, 3)}")
    return {key.removeprefix("transformer."): value for key, value in values.items()}


def _refuse_other_maths(where: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for a setting that changes, or if unknown may change, base + factor·A·B."""
    for key, value in values.items():
        if key in _USED or key in _HARMLESS or not value or value == _NEUTRAL.get(key):
            continue
        if key == "init_lora_weights" and str(value).lower() in _INITS:
            continue
        raise UserError(
            f"{where}: has {key} = {str(value)[:60]}, so it is more than base + A·B; merge it into the base with PEFT"
        )


def _peft_factors(
    where: str, values: Mapping[str, Any], keys: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, float]:
    """PEFT's factor for each module: alpha / r, or alpha / √r with rslora; patterns may change alpha and r."""
    rooted = values.get("use_rslora") or False
    if not isinstance(rooted, bool):
        raise UserError(f"{where}: use_rslora is {rooted!r}; expected true or false")
    factors = {}
    for module, rank in ranks.items():
        said = _setting(where, values, "r", "rank_pattern", keys[module])
        alpha = _setting(where, values, "lora_alpha", "alpha_pattern", keys[module])
        if said != rank:
            raise UserError(f"{where}: says rank {said:g} for {module}, whose tensors have {rank}")
        factors[module] = alpha / (math.sqrt(rank) if rooted else rank)
    return factors


def _setting(where: str, values: Mapping[str, Any], name: str, patterns_name: str, key: str) -> float:
    """A module's value: that of the first pattern that matches its name, otherwise the general one."""
    patterns = values.get(patterns_name) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where}: {patterns_name} is {patterns!r}; expected an object of names and numbers")
    for pattern, value in patterns.items():
        # PEFT's rule: a pattern must match the whole name, or its end after a dot.
        try:
            if re.match(rf"(.*\.)?({pattern})$", key):
                return _positive(where, f"{patterns_name}[{pattern!r}]", value)
        except re.error as error:
            raise UserError(f"{where}: {patterns_name} has {pattern!r}, not a pattern ({error})") from None
    return _positive(where, name, patterns.get(key, values.get(name)))


# --- tensors ------------------------------------------------------------------------------------------


def _alpha_factors(reader: TensorReader, names: Names, ranks: Mapping[str, int]) -> dict[str, float]:
    """alpha / rank of each module."""
    missing = [module for module in ranks if module not in names.alphas]
    extra = [name for module, name in names.alphas.items() if module not in ranks]
    if missing or extra:
        raise UserError(
            f"{reader.source}: expected an .alpha for every module or for none; without one: "
            f"{listed(missing, 3) or 'none'}; without a module: {listed(extra, 3) or 'none'}"
        )
    return {module: _alpha_of(reader, names.alphas[module]) / rank for module, rank in ranks.items()}


def _alpha_of(reader: TensorReader, name: str) -> float:
    array = reader.read(name)
    if array.size != 1:
        raise UserError(f"{reader.source}: {name} is {array.shape}; expected one number")
    return _positive(str(reader.source), name, float(array.reshape(-1)[0]))


def _positive(where: str, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST:
        raise UserError(f"{where}: {name} is {str(value)[:60]}; expected a number above 0")
    return float(value)
