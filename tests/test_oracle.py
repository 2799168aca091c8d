"""Checks of the PyTorch oracle itself: a parity test is worth as much as what it compares with."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from photos import photos

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import AutoencoderKL, SD3Transformer2DModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

import oracle_models as models  # noqa: E402
from oracle_pipeline import (  # noqa: E402
    OraclePipeline,
    adain,
    latent_tiles,
    low_frequencies,
    tile_weights,
    to_image,
    to_tensor,
    wavelet,
)

IDLE_NAMES = ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine torch's second thread mostly spins: three times as slow on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> OraclePipeline:
    prompt, pooled = models.random_prompt(tmp_path_factory.mktemp("prompt"), seed=3)
    return OraclePipeline(models.tiny_transformer(1), models.tiny_vae(2), prompt, pooled)


def transformer_output(model: SD3Transformer2DModel, seed: int = 0) -> Tensor:
    """The velocity (2, 16, 12, 20) for a fixed random input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(2, 16, 12, 20, generator=generator),
            timestep=torch.tensor([1000.0, 321.0]),
            encoder_hidden_states=torch.randn(2, 21, 48, generator=generator),
            pooled_projections=torch.randn(2, 40, generator=generator),
        ).sample


def encoder_output(model: AutoencoderKL, seed: int = 0) -> Tensor:
    """Mean and log-variance (1, 32, 8, 12) for a fixed random picture."""
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        return model.encode(picture).latent_dist.parameters


def relative_change(new: Tensor, old: Tensor) -> float:
    """‖new - old‖ / ‖old‖."""
    return float((new - old).norm() / old.norm())


# --- latent tiles -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "offsets"), [(64, [0]), (40, [0]), (65, [0, 1]), (120, [0, 56]), (128, [0, 56, 64])]
)
def test_tile_offsets(length: int, offsets: list[int]) -> None:
    assert latent_tiles(length, tile=64, overlap=8) == offsets


@pytest.mark.parametrize(("tile", "overlap"), [(64, 8), (16, 4), (9, 8), (10, 0)])
def test_tiles_cover_every_cell_and_stay_inside(tile: int, overlap: int) -> None:
    for length in range(tile, 6 * tile):
        offsets = latent_tiles(length, tile, overlap)
        assert offsets == sorted(set(offsets)) and offsets[0] == 0 and offsets[-1] == length - tile
        assert all(later - earlier <= tile - overlap for earlier, later in itertools.pairwise(offsets))


def test_tile_weights_follow_the_formula() -> None:
    weights = tile_weights(64)
    assert weights.dtype == torch.float64
    for row, column in [(0, 0), (32, 31), (32, 32), (63, 5), (10, 63)]:
        exponent = ((row - 32) / 64) ** 2 / 0.02 + ((column - 31.5) / 64) ** 2 / 0.02
        assert float(weights[row, column]) == pytest.approx(
            math.exp(-exponent) / (2 * math.pi * 0.01), rel=1e-12
        )
    assert float(weights.max()) == pytest.approx(15.9, abs=0.05)
    assert float(weights.min()) == pytest.approx(3e-10, rel=0.15)


def test_tile_weights_are_symmetric_in_columns_only() -> None:
    weights = tile_weights(16)
    assert torch.equal(weights, weights.flip(1))
    assert not torch.allclose(weights, weights.flip(0))
    torch.testing.assert_close(weights[1:], weights[1:].flip(0))  # the rows' centre is T/2
    assert not torch.allclose(weights, weights.T)


def test_tiled_velocity_is_the_weighted_mean_of_its_tiles(pipeline: OraclePipeline) -> None:
    latent = torch.randn(1, 16, 64, 65, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = pipeline.velocity(latent).double()
        left = pipeline.predict(latent[..., :64]).double()
        right = pipeline.predict(latent[..., 1:]).double()
    weights = tile_weights(64)
    torch.testing.assert_close(velocity[..., 0], left[..., 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity[..., 64], right[..., 63], atol=1e-5, rtol=1e-5)
    mixed = weights[:, 1:] * left[..., 1:] + weights[:, :-1] * right[..., :-1]
    expected = mixed / (weights[:, 1:] + weights[:, :-1])
    torch.testing.assert_close(velocity[..., 1:64], expected, atol=1e-5, rtol=1e-5)


# --- sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "processed", "final"),
    [
        ((128, 128), (512, 512), (512, 512)),
        ((130, 128), (520, 512), (520, 512)),
        ((129, 130), (512, 520), (516, 520)),
        ((100, 100), (512, 512), (400, 400)),
        ((64, 1000), (512, 8000), (256, 4000)),
    ],
)
def test_size_examples(
    pipeline: OraclePipeline, size: tuple[int, int], processed: tuple[int, int], final: tuple[int, int]
) -> None:
    assert pipeline.plan(*size) == (processed, final)


def test_default_flags_fail_at_four_shorter_sides_only(pipeline: OraclePipeline) -> None:
    def is_defective(side: int) -> bool:
        try:
            pipeline.plan(side, side)
        except AssertionError as error:
            assert "odd latent side while untiled" in str(error)
            return True
        return False

    assert [side for side in range(1, 200) if is_defective(side)] == [49, 98, 103, 107]


def test_other_defective_sizes_are_named(pipeline: OraclePipeline) -> None:
    def variant(**flags: int) -> OraclePipeline:
        return OraclePipeline(**(vars(pipeline) | flags))

    with pytest.raises(AssertionError, match="odd tile side 63"):
        pipeline.plan(49, 70)
    with pytest.raises(AssertionError, match="odd latent side while untiled"):
        variant(latent_tile=80).plan(130, 130)
    with pytest.raises(AssertionError, match="never ends"):
        variant(process_size=64).plan(16, 2000)
    with pytest.raises(AssertionError, match="position table"):
        variant(latent_tile=128).plan(224, 128)


# --- networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}])
def test_every_transformer_parameter_matters(overrides: dict) -> None:
    """Only the last block's text query is computed for nothing, its bias and norm with it."""
    model = models.tiny_transformer(0, **overrides)
    output = model(
        hidden_states=torch.randn(1, 16, 8, 12),
        timestep=torch.tensor([1000.0]),
        encoder_hidden_states=torch.randn(1, 21, 48),
        pooled_projections=torch.randn(1, 40),
    ).sample
    output.square().mean().backward()
    idle = {
        name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-7
    }
    # A bias on all keys would not move the softmax; image and text have one each, so their difference does.
    assert idle <= {f"transformer_blocks.2.attn.{name}" for name in IDLE_NAMES}
    assert 0.3 < float(output.detach().std()) < 3


def test_seeds_reproduce_and_differ() -> None:
    first, again, other = (models.tiny_transformer(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    assert "pos_embed.pos_embed" in first and first["pos_embed.pos_embed"].shape == (1, 48 * 48, 64)


def test_vae_has_sd3s_structure() -> None:
    vae = models.tiny_vae(0)
    parameters = encoder_output(vae)
    assert parameters.shape == (1, 32, 8, 12)
    assert parameters[:, 16:].abs().max() < 8
    assert vae.quant_conv is None and vae.post_quant_conv is None
    shortcuts = [
        name for name in vae.state_dict() if name.startswith("encoder") and "conv_shortcut.w" in name
    ]
    assert shortcuts == [f"encoder.down_blocks.{i}.resnets.0.conv_shortcut.weight" for i in (1, 2)]


# --- checkpoint folders -----------------------------------------------------------------


def file_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


COMMON_FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
}


def test_plain_folder(tmp_path: Path) -> None:
    transformer, vae = models.tiny_transformer(0), models.tiny_vae(1)
    models.save_diffusers_folder(tmp_path, transformer, vae)
    weights = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "vae")}
    assert file_names(tmp_path) == COMMON_FILES | weights
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert scheduler["shift"] == 3.0 and scheduler["num_train_timesteps"] == 1000
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(transformer_output(loaded), transformer_output(transformer))
    loaded = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    assert torch.equal(encoder_output(loaded), encoder_output(vae))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_folder(tmp_path: Path, variant: str | None) -> None:
    transformer, vae = models.tiny_transformer(0), models.tiny_vae(1)
    models.save_diffusers_folder(tmp_path, transformer, vae, torch.float16, "300KB", variant)
    suffix = f".{variant}" if variant else ""
    for part, model in {"transformer": transformer, "vae": vae}.items():
        index_name = f"diffusion_pytorch_model.safetensors.index{suffix}.json"
        weight_map = json.loads((tmp_path / part / index_name).read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
        count = len(shards)
        assert count > 1
        stem = f"diffusion_pytorch_model{suffix}"
        assert shards == [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        assert file_names(tmp_path / part) == {"config.json", index_name, *shards}
        tensors = {
            name: tensor for shard in shards for name, tensor in load_file(tmp_path / part / shard).items()
        }
        assert tensors.keys() == model.state_dict().keys() == weight_map.keys()
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert transformer.dtype == vae.dtype == torch.float32


def test_variant_folder(tmp_path: Path) -> None:
    transformer, vae = models.tiny_transformer(0), models.tiny_vae(1)
    models.save_diffusers_folder(tmp_path, transformer, vae, torch.float16, variant="fp16")
    weights = {f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("transformer", "vae")}
    assert file_names(tmp_path) == COMMON_FILES | weights


def test_prompt_files(tmp_path: Path) -> None:
    prompt, pooled = models.random_prompt(tmp_path / "default", seed=5)
    assert prompt.shape == (1, 21, 48) and pooled.shape == (1, 40)
    assert torch.equal(torch.load(tmp_path / "default/prompt_embeds.pt", weights_only=True), prompt)
    assert torch.equal(torch.load(tmp_path / "default/pool_embeds.pt", weights_only=True), pooled)


# --- LoRA -------------------------------------------------------------------------------


def expected_student_modules(layers: int) -> set[str]:
    """What the student adapts in a plain SD3 transformer, whose last block has no text MLP."""
    names = {"pos_embed.proj", "norm_out.linear", "proj_out"}
    for i in range(layers):
        parts = [f"attn.{name}" for name in ATTENTION] + [
            "norm1.linear",
            "norm1_context.linear",
            "ff.net.0.proj",
        ]
        parts += ["ff_context.net.0.proj"] if i < layers - 1 else []
        names |= {f"transformer_blocks.{i}.{part}" for part in parts}
    return names


def expected_vae_modules() -> set[str]:
    names = {
        "conv_in",
        "conv_out",
        "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.2.resnets.0.conv_shortcut",
    }
    names |= {f"down_blocks.{i}.resnets.{j}.conv{k}" for i in range(4) for j in (0, 1) for k in (1, 2)}
    names |= {f"down_blocks.{i}.downsamplers.0.conv" for i in range(3)}
    names |= {f"mid_block.resnets.{j}.conv{k}" for j in (0, 1) for k in (1, 2)}
    names |= {f"mid_block.attentions.0.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    return {f"encoder.{name}" for name in names}


def weighted_modules(model: torch.nn.Module) -> set[str]:
    """The paths of all linear layers and convolutions of a network without LoRA."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def lora_keys(modules: set[str]) -> set[str]:
    return {f"transformer.{module}.lora_{half}.weight" for module in modules for half in "AB"}


def test_student_lora_targets_and_keys(tmp_path: Path) -> None:
    transformer = models.tiny_transformer(0)
    every_module = weighted_modules(transformer)
    models.add_student_lora(transformer, rank=4, seed=1)
    expected = expected_student_modules(layers=3)
    assert models.adapted_modules(transformer) == expected
    embedders = {f"{name}_embedder.linear_{i}" for name in ("timestep", "text") for i in (1, 2)}
    assert every_module - expected == (
        {"context_embedder"}
        | {f"time_text_embed.{name}" for name in embedders}
        | {f"transformer_blocks.{i}.ff.net.2" for i in range(3)}
        | {
            f"transformer_blocks.{i}.{name}"
            for i in (0, 1)
            for name in ("attn.to_add_out", "ff_context.net.2")
        }
    )
    models.save_lora(transformer, tmp_path / "lora/transformer.safetensors")
    tensors = load_file(tmp_path / "lora/transformer.safetensors")
    assert tensors.keys() == lora_keys(expected)
    assert tensors["transformer.pos_embed.proj.lora_A.weight"].shape == (4, 16, 2, 2)
    assert tensors["transformer.pos_embed.proj.lora_B.weight"].shape == (64, 4, 1, 1)
    assert tensors["transformer.norm_out.linear.lora_A.weight"].shape == (4, 64)
    assert tensors["transformer.norm_out.linear.lora_B.weight"].shape == (128, 4)
    assert all(float(tensor.std()) > 1e-3 for tensor in tensors.values())


def test_dual_attention_is_adapted_too() -> None:
    transformer = models.tiny_transformer(0, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    models.add_student_lora(transformer, rank=4, seed=1)
    second = {f"transformer_blocks.{i}.attn2.{name}" for i in (0, 1) for name in ATTENTION[:4]}
    assert models.adapted_modules(transformer) == expected_student_modules(layers=3) | second


def test_aux_lora_targets_and_keys(tmp_path: Path) -> None:
    transformer = models.tiny_transformer(0)
    models.add_aux_lora(transformer, rank=2, seed=1)
    expected = {f"transformer_blocks.{i}.attn.{name}" for i in range(3) for name in ATTENTION}
    assert models.adapted_modules(transformer) == expected
    models.save_lora(transformer, tmp_path / "transformer_reg.safetensors")
    assert load_file(tmp_path / "transformer_reg.safetensors").keys() == lora_keys(expected)


def test_vae_lora_targets_and_keys(tmp_path: Path) -> None:
    vae = models.tiny_vae(0)
    encoder_modules = {name for name in weighted_modules(vae) if name.startswith("encoder.")}
    models.add_vae_lora(vae, rank=4, seed=1)
    assert models.adapted_modules(vae) == expected_vae_modules() == encoder_modules
    models.save_lora(vae, tmp_path / "vae.safetensors")
    tensors = load_file(tmp_path / "vae.safetensors")
    assert tensors.keys() == lora_keys(expected_vae_modules())
    assert tensors["transformer.encoder.down_blocks.0.downsamplers.0.conv.lora_A.weight"].shape == (
        4,
        8,
        3,
        3,
    )
    assert tensors["transformer.encoder.down_blocks.0.downsamplers.0.conv.lora_B.weight"].shape == (
        8,
        4,
        1,
        1,
    )


def test_a_vae_with_quant_conv_has_it_adapted() -> None:
    vae = models.tiny_vae(0, use_quant_conv=True, use_post_quant_conv=True)
    models.add_vae_lora(vae, rank=4, seed=1)
    assert models.adapted_modules(vae) == expected_vae_modules() | {"quant_conv"}


def test_loras_change_the_output_by_a_sensible_amount() -> None:
    student, aux, vae = models.tiny_transformer(0), models.tiny_transformer(0), models.tiny_vae(0)
    models.add_student_lora(student, rank=4, seed=1)
    models.add_aux_lora(aux, rank=4, seed=1)
    models.add_vae_lora(vae, rank=4, seed=1)
    outputs = {
        "student": (student, transformer_output),
        "aux": (aux, transformer_output),
        "vae": (vae, encoder_output),
    }
    for name, (model, output) in outputs.items():
        plain = models.without_lora(model, lambda model=model, output=output: output(model))
        change = relative_change(output(model), plain)
        print(f"{name} LoRA: relative change of the output {change:.3f}")
        assert 0.02 < change < 0.7


def test_lora_goes_through_a_file(tmp_path: Path) -> None:
    cases = [
        (models.tiny_transformer, models.add_student_lora, models.STUDENT_TARGETS, transformer_output),
        (models.tiny_vae, models.add_vae_lora, models.VAE_TARGETS, encoder_output),
    ]
    for make, add, targets, output in cases:
        source, target = make(0), make(0)
        add(source, rank=3, seed=1)
        models.save_lora(source, tmp_path / "lora.safetensors")
        models.load_lora_into(target, tmp_path / "lora.safetensors", targets)
        assert torch.equal(output(target), output(source))


def test_several_adapters_on_one_transformer(tmp_path: Path) -> None:
    model = models.tiny_transformer(0)
    plain = transformer_output(model)
    models.add_student_lora(model, rank=4, seed=1, adapter="student")
    student = transformer_output(model)
    models.add_aux_lora(model, rank=2, seed=2, adapter="aux")
    aux = transformer_output(model)
    model.set_adapter("student")
    assert torch.equal(transformer_output(model), student)
    assert torch.equal(models.without_lora(model, lambda: transformer_output(model)), plain)
    models.save_lora(model, tmp_path / "transformer_reg.safetensors", adapter="aux")
    alone = models.tiny_transformer(0)
    models.load_lora_into(alone, tmp_path / "transformer_reg.safetensors", models.AUX_TARGETS)
    assert torch.equal(transformer_output(alone), aux)


@pytest.mark.parametrize("offence", ["unexpected", "missing", "misshapen", "without prefix"])
def test_a_lora_file_that_does_not_fit_is_refused(tmp_path: Path, offence: str) -> None:
    source = models.tiny_transformer(0)
    models.add_aux_lora(source, rank=2, seed=1)
    path = tmp_path / "lora.safetensors"
    models.save_lora(source, path)
    tensors = load_file(path)
    victim = "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"
    tensor = tensors.pop(victim)
    replacement = {
        "unexpected": {victim: tensor, "transformer.context_embedder.lora_B.weight": tensor.clone()},
        "missing": {},
        "misshapen": {victim: tensor[:-1].clone()},
        "without prefix": {victim.removeprefix("transformer."): tensor},
    }[offence]
    save_file(tensors | replacement, path)
    with pytest.raises(ValueError, match=offence) as error:
        models.load_lora_into(models.tiny_transformer(0), path, models.AUX_TARGETS)
    named = "context_embedder" if offence == "unexpected" else "transformer_blocks.1.attn.to_q"
    assert named in str(error.value)


# --- pictures and colour ----------------------------------------------------------------


def test_eight_bit_levels_survive_and_fractions_are_cut() -> None:
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(
        to_tensor(to_image(to_tensor(to_image(levels / 255)))), to_tensor(to_image(levels / 255))
    )
    assert np.array(to_image(torch.full((1, 3, 2, 2), 0.9999))).max() == 254


def test_adain_takes_over_the_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    picture, source = (
        torch.rand(1, 3, 40, 30, generator=generator),
        torch.rand(1, 3, 9, 11, generator=generator) / 3,
    )
    aligned = adain(picture, source)
    for statistic in (torch.mean, torch.std):
        actual, expected = (statistic(x, dim=(-2, -1)) for x in (aligned, source))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_wavelet_keeps_detail_and_takes_over_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    picture, source = (torch.rand(1, 3, 70, 90, generator=generator) for _ in range(2))
    torch.testing.assert_close(wavelet(picture, picture + 0.25), picture + 0.25, atol=1e-6, rtol=0)
    torch.testing.assert_close(wavelet(picture, source) - picture, low_frequencies(source - picture))


def test_low_frequencies_have_the_stated_width() -> None:
    impulse = torch.zeros(1, 3, 129, 129)
    impulse[..., 64, 64] = 1
    profile = low_frequencies(impulse)[0, 0].sum(0).double()
    distance = torch.arange(129, dtype=torch.float64) - 64
    assert float(profile.sum()) == pytest.approx(1, abs=1e-5)
    assert float((profile * distance**2).sum().sqrt()) == pytest.approx(13.06, abs=0.01)
    assert profile[64 - 31] > 0 and profile[64 - 32] == 0 and profile[64 + 31] > 0 and profile[64 + 32] == 0


# --- the whole way ----------------------------------------------------------------------

STAGES = ["lr_input", "latent", "velocity", "predicted", "decoded", "before_colour", "colour"]


@pytest.mark.parametrize("size", [(128, 128), (130, 128), (129, 130), (100, 60)])
def test_photographs_give_useful_pictures(pipeline: OraclePipeline, size: tuple[int, int]) -> None:
    (photo,) = photos(1, size)
    picture, stages = pipeline.upscale_image(photo, "nofix", capture=True)
    assert picture.size == (4 * size[0], 4 * size[1]) and picture.mode == "RGB"
    assert list(stages) == STAGES
    assert stages["lr_input"].shape == stages["decoded"].shape
    percentiles = np.percentile(stages["decoded"].numpy(), [1, 10, 50, 90, 99])
    print(f"{size}: decoded percentiles 1/10/50/90/99: {percentiles.round(2)}")
    assert percentiles[-1] - percentiles[0] > 0.8, "the picture is flat"
    assert float((stages["decoded"].abs() == 1).float().mean()) < 0.05, "the picture is clipped"
    assert 0.3 < float(stages["latent"].std()) < 3 and 0.3 < float(stages["velocity"].std()) < 3


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_colour_comes_from_the_photograph(pipeline: OraclePipeline, method: str) -> None:
    (photo,) = photos(1, (129, 130))
    plain = pipeline.upscale_image(photo, "nofix")
    aligned = pipeline.upscale_image(photo, method)
    assert aligned.size == plain.size == (516, 520)

    def colour_error(image: Image.Image) -> float:
        return float((to_tensor(image).mean((-2, -1)) - to_tensor(photo).mean((-2, -1))).abs().max())

    assert colour_error(aligned) < 0.03 < colour_error(plain)


def test_different_photographs_give_different_pictures(pipeline: OraclePipeline) -> None:
    pictures = [to_tensor(pipeline.upscale_image(photo, "nofix")) for photo in photos(2, (128, 128))]
    assert relative_change(pictures[0] - 0.5, pictures[1] - 0.5) > 0.2


def test_loras_change_the_picture(pipeline: OraclePipeline) -> None:
    (photo,) = photos(1, (128, 128))
    transformer, vae = models.tiny_transformer(1), models.tiny_vae(2)
    models.add_student_lora(transformer, rank=4, seed=4)
    models.add_vae_lora(vae, rank=4, seed=5)
    adapted = OraclePipeline(transformer, vae, pipeline.prompt_embeds, pipeline.pooled_embeds)
    _, before = pipeline.upscale_image(photo, "nofix", capture=True)
    _, after = adapted.upscale_image(photo, "nofix", capture=True)
    changes = {name: relative_change(after[name], before[name]) for name in ("latent", "velocity", "decoded")}
    print(f"relative changes by the LoRAs: { {name: round(change, 3) for name, change in changes.items()} }")
    assert all(0.02 < change < 1 for change in changes.values())
