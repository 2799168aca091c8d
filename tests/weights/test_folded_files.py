"""The folded transformer in a converted folder: used if it is what folding anew would give, and never otherwise."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import leaves, random_params
from tiny_checkpoint import random_prompt, save_everything, tiny_mmdit_config
from tsdsr_jax.commands import convert_sd3
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.folded import FOLD_LAYOUT, fold
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.upscaling import loading
from tsdsr_jax.upscaling.loading import load_engine
from tsdsr_jax.upscaling.options import UpscaleOptions, complete_options
from tsdsr_jax.weights.prompt_files import save_prompt_embeds
from tsdsr_jax.weights.sd3_folder import FOLDED_FILE, PARAMS_FILE, open_checkpoint
from tsdsr_jax.weights.tensor_files import open_tensors, save_tensors

Sd3 = Callable[..., None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folded")
    save_everything(folder)
    save_prompt_embeds(folder / "other", random_prompt(tiny_mmdit_config(), seed=9))
    return folder


@pytest.fixture
def sd3(root: Path, monkeypatch: pytest.MonkeyPatch) -> Sd3:
    """convert/sd3.py in this process, from the checkpoint and for its prompt."""

    def run(output: Path, *flags: object) -> None:
        prompt = ["--embedding_dir", root / "prompt"] if "--fold" in flags else []
        arguments = ["-i", root / "sd3", "-o", output, *prompt, *flags]
        monkeypatch.setattr(sys, "argv", ["sd3.py", *map(str, arguments)])
        convert_sd3.main()

    return run


def options_of(root: Path, model: Path, **flags: Any) -> UpscaleOptions:
    settings = dict(lora_dir="none", embedding_dir=root / "prompt", rank=None, rank_vae=None) | flags
    return complete_options(UpscaleOptions(pretrained_model_name_or_path=str(model), **settings))


def loaded(options: UpscaleOptions) -> tuple[dict[str, np.ndarray], list[str]]:
    """The transformer's parameters, and what was said about the file."""
    said: list[str] = []
    engine = load_engine(options, jax.local_devices()[:1], said.append)
    return leaves(engine.networks.transformer), [line for line in said if FOLDED_FILE in line]


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def without_file(model: Path, root: Path, **flags: Any) -> dict[str, np.ndarray]:
    """What folding anew gives."""
    folded = model / "transformer" / FOLDED_FILE
    folded.rename(model / "aside")
    try:
        return loaded(options_of(root, model, **flags))[0]
    finally:
        (model / "aside").rename(folded)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ([], "fp32"),
        ([], "fp16"),  # a file in float32 serves every precision
        (["--dtype", "bfloat16"], "bf16"),
        (["--dtype", "float16", "--lora_dir", "LORA"], "fp16"),
    ],
    ids=["float32", "cast", "bfloat16", "lora merged"],
)
def test_equal_to_folding_anew(
    root: Path, tmp_path: Path, sd3: Sd3, monkeypatch: pytest.MonkeyPatch, flags: list[str], precision: str
) -> None:
    model = tmp_path / "model"
    sd3(model, "--fold", "beside", *[root / "lora" if flag == "LORA" else flag for flag in flags])
    expected = without_file(model, root, mixed_precision=precision)
    monkeypatch.delattr(loading, "fold_parts")
    found, said = loaded(options_of(root, model, mixed_precision=precision))
    assert_equal(found, expected)
    assert not said


def change_weights(model: Path) -> None:
    path = model / "transformer" / PARAMS_FILE
    reader = open_tensors(path)
    tensors = {name: reader.read(name) for name in reader.specs}
    tensors["blocks_0/attn/to_q/kernel"] *= 1.01
    save_tensors(path, tensors, reader.metadata)


def change_config(model: Path) -> None:
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 64}))


def change_header(**entries: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "transformer" / FOLDED_FILE
        reader = open_tensors(path)
        save_tensors(path, {name: reader.read(name) for name in reader.specs}, reader.metadata | entries)

    return change


def unchanged(model: Path) -> None:
    pass


STALE: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "another prompt": (unchanged, dict(embedding_dir="other"), "it is for another prompt"),
    "a LoRA": (unchanged, dict(lora_dir="lora"), "it does not contain the LoRA in --lora_dir"),
    "a weaker LoRA": (
        unchanged,
        dict(lora_dir="lora", lora_scale=0.5),
        "it does not contain the LoRA in --lora_dir",
    ),
    "precision": (unchanged, dict(mixed_precision="fp32"), "it is in float16, and this run needs float32"),
    "eight bits": (unchanged, dict(weights="int8"), "eight bits are made from the full weights"),
    "weights": (change_weights, {}, "it was made from other weights"),
    "config": (change_config, {}, "config.json has changed since it was made"),
    "layout": (
        change_header(layout=str(FOLD_LAYOUT + 1)),
        {},
        "another version of tsdsr_jax made it",
    ),
    "timestep": (change_header(timestep="500.0"), {}, "it is for another timestep"),
    "format": (change_header(format="pt"), {}, "it is no file of convert/sd3.py --fold"),
}


@pytest.mark.parametrize("case", STALE)
def test_what_does_not_fit_is_said_and_folded_anew(root: Path, tmp_path: Path, sd3: Sd3, case: str) -> None:
    change, flags, reason = STALE[case]
    model = tmp_path / "model"
    sd3(model, "--fold", "beside", "--dtype", "float16")
    change(model)
    flags = {"mixed_precision": "fp16"} | flags
    flags |= {name: root / flags[name] for name in ("embedding_dir", "lora_dir") if name in flags}
    if "lora_dir" in flags:
        flags["lora_dir"] = str(flags["lora_dir"])
    found, said = loaded(options_of(root, model, **flags))
    (line,) = said
    assert (
        line
        == f"note: {model / 'transformer' / FOLDED_FILE} is not used, because {reason}; folding the transformer anew"
    )
    assert_equal(found, without_file(model, root, **flags))


# --- only the folded transformer ----------------------------------------------------------------------


def test_only_the_folded_transformer_upscales(root: Path, tmp_path: Path, sd3: Sd3) -> None:
    """As the source with its LoRA does, merged in the same float32."""
    model = tmp_path / "model"
    sd3(model, "--fold", "only", "--lora_dir", root / "lora")
    assert not (model / "transformer" / PARAMS_FILE).exists() and (model / "vae" / PARAMS_FILE).exists()
    found, said = loaded(options_of(root, model))
    assert not said
    assert_equal(found, loaded(options_of(root, root / "sd3", lora_dir=str(root / "lora")))[0])


@pytest.mark.parametrize("case", [case for case in STALE if case != "weights"])
def test_only_the_folded_transformer_serves_nothing_else(
    root: Path, tmp_path: Path, sd3: Sd3, case: str
) -> None:
    change, flags, reason = STALE[case]
    model = tmp_path / "model"
    sd3(model, "--fold", "only", "--dtype", "float16")
    change(model)
    flags = {"mixed_precision": "fp16"} | flags
    flags |= {name: root / flags[name] for name in ("embedding_dir",) if name in flags}
    if "lora_dir" in flags:
        flags["lora_dir"] = str(root / "lora")
    with pytest.raises(UserError) as caught:
        loaded(options_of(root, model, **flags))
    said = str(caught.value)
    assert reason in said and "pass the checkpoint that it was made from" in said and "\n" not in said


def test_training_and_converting_refuse_a_folder_without_weights(
    root: Path, tmp_path: Path, sd3: Sd3
) -> None:
    model = tmp_path / "model"
    sd3(model, "--fold", "only")
    with pytest.raises(UserError, match=r"has the transformer only as folded for one prompt") as caught:
        open_checkpoint(model).network("transformer").load(jnp.float32)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"has the transformer only as folded"):
        sd3(tmp_path / "again", "-i", model)


def test_weights_that_are_gone_are_not_missed(root: Path, tmp_path: Path, sd3: Sd3) -> None:
    """But others in their place are noticed."""
    model = tmp_path / "model"
    sd3(model, "--fold", "beside")
    weights = model / "transformer" / PARAMS_FILE
    weights.rename(tmp_path / "aside")
    found, said = loaded(options_of(root, model))
    assert not said
    (tmp_path / "aside").rename(weights)
    assert_equal(found, without_file(model, root))
    sd3(tmp_path / "merged", "--lora_dir", root / "lora")
    (tmp_path / "merged" / "transformer" / PARAMS_FILE).replace(weights)
    assert "it was made from other weights" in loaded(options_of(root, model))[1][0]


# --- the command ------------------------------------------------------------------------------------


def test_converting_again_removes_the_older_file(root: Path, tmp_path: Path, sd3: Sd3) -> None:
    model = tmp_path / "model"
    sd3(model, "--fold", "only")
    with pytest.raises(UserError, match=f"{FOLDED_FILE}: already exists; pass --overwrite"):
        sd3(model, "--fold", "beside")
    sd3(model, "--fold", "beside", "--overwrite")
    assert (model / "transformer" / PARAMS_FILE).exists()
    sd3(model, "--fold", "only", "--overwrite")
    assert not (model / "transformer" / PARAMS_FILE).exists()


def test_a_converted_folder_can_be_folded(root: Path, tmp_path: Path, sd3: Sd3) -> None:
    sd3(tmp_path / "plain", "--fold", "beside")
    sd3(tmp_path / "again", "-i", tmp_path / "plain", "--fold", "beside")
    files = [tmp_path / name / "transformer" / FOLDED_FILE for name in ("plain", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--embedding_dir", "nowhere"], "--embedding_dir: only --fold needs a prompt"),
        (["--fold", "beside", "--to_diffusers"], "leave out --to_diffusers or --fold"),
        (["--fold", "beside", "--embedding_dir", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, sd3: Sd3, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sd3(tmp_path / "model", *flags)
    assert not (tmp_path / "model").exists()


def test_what_half_precision_cannot_hold_is_refused(root: Path, tmp_path: Path, sd3: Sd3) -> None:
    sd3(tmp_path / "large")
    path = tmp_path / "large" / "transformer" / PARAMS_FILE
    reader = open_tensors(path)
    tensors = {name: reader.read(name) for name in reader.specs}
    tensors["blocks_0/ff/net_2/kernel"][0, 0, 0] = 60000
    tensors["blocks_0/norm1/linear/bias"] += 10
    save_tensors(path, tensors, reader.metadata)
    model = tmp_path / "model"
    with pytest.raises(UserError, match=r"outside the range of float16 after folding; choose --dtype"):
        sd3(model, "-i", tmp_path / "large", "--fold", "only", "--dtype", "float16")
    assert not (model / "transformer" / FOLDED_FILE).exists()


# --- the layout's number ------------------------------------------------------------------------------


def test_a_change_of_the_folded_layout_raises_its_number() -> None:
    """If this fails, `fold` makes other parameters than before: raise FOLD_LAYOUT, and write the new values here."""
    config = MMDiTConfig.tiny(num_layers=4, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    prompt = random_prompt(config)
    made = leaves(fold(config, random_params(config), prompt.prompt, prompt.pooled, 1000.0, jnp.float32))
    names = "".join(sorted(f"{path} {leaf.shape};" for path, leaf in made.items()))
    values = sum(float(np.abs(leaf).mean()) for leaf in made.values())
    assert (FOLD_LAYOUT, hashlib.sha256(names.encode()).hexdigest()[:12]) == (1, "237b4a09a651")
    assert values == pytest.approx(34.74, abs=0.05)
