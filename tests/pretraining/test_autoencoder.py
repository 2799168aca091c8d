"""The autoencoder's loss and gradients match PyTorch; and the training command."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

import tiny_checkpoint as tiny
import tiny_training
from commands import SPELLINGS, Command, resume_by_every_spelling
from parity import error, nhwc, params_of
from tsdsr_jax.commands import autoencoder
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.pretraining.autoencoder import (
    AutoencoderConfig,
    AutoencoderLoss,
    Frozen,
    new_autoencoder_params,
)
from tsdsr_jax.training import checkpoint, options, sharding
from tsdsr_jax.training.log import read_rows
from tsdsr_jax.weights.sd3_folder import NetworkFiles, torch_config
from tsdsr_jax.weights.torch_names import write_base

pytestmark = pytest.mark.usefixtures("quick_compilation")

pytest_plugins = "parity"


def test_loss_and_gradients_are_pytorchs(oracle, size=(16, 24), batch=3):
    """Gradients differ by at most 1e-4 of each tensor's largest value."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    vae = oracle.tiny_vae(2)
    config = VAEConfig.from_dict(dict(vae.config))
    weights = AutoencoderConfig(gradient=0.7, kl=0.05)
    # Always the same images: if a difference is 0 up to rounding, its sign is arbitrary, and so is the gradient.
    images = np.random.default_rng(batch).uniform(-1, 1, (batch, 3, *size)).astype(np.float32)
    loss = AutoencoderLoss(AutoencoderKL(config), weights)
    params, key = params_of(vae), jax.random.key(4)
    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = value_and_grad(params, Frozen(), nhwc(images), key)

    x = torch.from_numpy(images)
    for parameter in vae.parameters():
        parameter.requires_grad_(True)
    posterior = vae.encode(x).latent_dist
    noise = jax.random.normal(key, nhwc(posterior.mean.detach().numpy()).shape)
    latents = posterior.mean + posterior.std * torch.from_numpy(
        np.asarray(noise).transpose(0, 3, 1, 2).copy()
    )
    difference = vae.decode(latents).sample - x
    edges = 0.0
    for scale in (1, 2, 4):
        coarse = functional.avg_pool2d(difference, scale)
        edges += coarse.diff(dim=2).abs().mean() + coarse.diff(dim=3).abs().mean()
    # torch sums the divergence over all axes but the batch.
    divergence = posterior.kl().mean() / latents[0].numel()
    total = difference.abs().mean() + 0.7 * edges / 3 + 0.05 * divergence
    total.backward()

    expected = {"autoencoder": total, "l1": difference.abs().mean(), "gradient": edges / 3, "kl": divergence}
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(
        {name: part.item() for name, part in expected.items()}, rel=1e-5
    )
    assert float(value) == float(metrics["autoencoder"])
    ours = dict(write_base(jax.tree.map(np.asarray, gradient), config))
    theirs = {name: parameter.grad.numpy() for name, parameter in vae.named_parameters()}
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(part).max() for part in theirs.values())
    for name, part in theirs.items():
        # A bias before a norm has no gradient beyond rounding errors.
        assert error(ours[name], part) <= 1e-4 or np.abs(ours[name] - part).max() <= 1e-6 * largest, name


def test_runs_of_versions_without_the_choice_of_attention_are_the_same_network():
    """They described it by these values; one without attention is another."""
    config = tiny.tiny_vae_config()
    names = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
             "scaling_factor", "shift_factor")  # fmt: skip
    values = {name: getattr(config, name) for name in names} | {"scaling_factor": 1.0}
    assert autoencoder.described(config) == json.dumps(values, sort_keys=True)
    other = dataclasses.replace(config, mid_block_add_attention=False)
    assert autoencoder.described(other) != autoencoder.described(config)


def test_a_new_autoencoder_starts_with_narrow_posteriors_and_no_residuals():
    config = tiny.tiny_vae_config()
    network, params = (
        AutoencoderKL(config),
        jax.jit(partial(new_autoencoder_params, config))(jax.random.key(0)),
    )
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    posterior = jax.jit(lambda images: network.apply({"params": params}, images, method="encode"))(images)
    assert posterior.mean.std() > 0.1 > np.exp(posterior.logvar / 2).mean() > 0.01
    zero = [
        path for path, leaf in flatten_dict(params, sep="/").items() if "kernel" in path and not leaf.any()
    ]
    blocks = [path for path in flatten_dict(params, sep="/") if path.endswith("conv1/kernel")]
    assert len(zero) == len(blocks) + 2 and all("conv2" in path or "to_out" in path for path in zero)


class Distance(nn.Module):
    """Replaces LPIPS: the same call, one parameter, and a distance per image."""

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.ones, ())
        return weight * jnp.square(first - second).mean((1, 2, 3))


def test_a_perceptual_distance_is_added():
    config = tiny.tiny_vae_config()
    params = tiny.random_params(config, 2)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    loss = AutoencoderLoss(AutoencoderKL(config), AutoencoderConfig(0, 0, lpips=0.3), Distance())
    key = jax.random.key(0)
    posterior = loss.posterior(params, images)
    rebuilt = loss.decode(params, posterior.sample(jax.random.normal(key, posterior.mean.shape)))
    value, metrics = loss(params, Frozen({"weight": jnp.float32(2)}), images, key)
    assert float(metrics["lpips"]) == pytest.approx(2 * float(np.square(rebuilt - images).mean()), rel=1e-4)
    assert float(value) == pytest.approx(float(metrics["l1"] + 0.3 * metrics["lpips"]), rel=1e-5)


# --- the command ----------------------------------------------------------------------------------


class Autoencoder(Command):
    """Trains a tiny autoencoder for four steps, by default on one device."""

    def flags(self, output: Path, *more: str) -> list[str]:
        # Given twice, the flag would set a height and a width.
        crop = () if "--crop_size" in more else ("--crop_size", "32")
        return [
            "--vae_dir", str(self.root / "vae"), "--hr_dir", str(self.root / "photos"), "--output_dir", str(output),
            "--from_scratch", "--train_batch_size", "2", "--mixed_precision", "no", "--learning_rate", "1e-3",
            "--max_train_steps", "4", "--checkpointing_steps", "2", "--validation_steps", "4",
            "--num_validation_images", "2", *crop, *more,
        ]  # fmt: skip

    def __call__(self, output: Path, *more: str, devices: int = 1):
        chosen = jax.devices()[:devices]
        self.monkeypatch.setattr(options, "make_mesh", lambda fsdp: sharding.make_mesh(chosen, fsdp))
        return super().__call__(output, *more)


@pytest.fixture
def command(tmp_path: Path, monkeypatch, capsys) -> Iterator[Autoencoder]:
    (tmp_path / "vae").mkdir()
    # An unusual factor, to show that it is measured again.
    config = torch_config(tiny.tiny_vae_config(scaling_factor=123.0))
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    tiny_training.save_photos(tmp_path / "photos", 6)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Autoencoder(autoencoder.main, "train/autoencoder.py", tmp_path, monkeypatch, capsys)
    for number, handler in before.items():
        signal.signal(number, handler)


def exported(output: Path, part: str = "vae") -> NetworkFiles:
    return NetworkFiles(checkpoint.find(output, "latest") / "model" / part, "vae")


def tensors(output: Path, part: str = "vae") -> dict[str, np.ndarray]:
    return load_file(exported(output, part).folder / "diffusion_pytorch_model.safetensors")


def losses(output: Path) -> list[float]:
    return [row["autoencoder"] for row in read_rows(output / "log.jsonl") if "autoencoder" in row]


def test_trained_exported_and_resumed(command, tmp_path):
    said = command.done(tmp_path / "whole", "--ema_decay", "0.9")
    assert "checkpoint_0000004/model/ema/vae;" in said and len(losses(tmp_path / "whole")) == 4
    files = exported(tmp_path / "whole")
    params = files.load(jnp.float32)
    # Every weight has been trained.
    first = flatten_dict(jax.jit(partial(new_autoencoder_params, files.config))(jax.random.key(0)))
    assert all((leaf != first[path]).any() for path, leaf in flatten_dict(params).items())
    # The scaling factor gives the photographs' latents a standard deviation of 1.
    average = exported(tmp_path / "whole", "ema/vae")
    assert 0 < files.config.scaling_factor != average.config.scaling_factor != 123
    network = AutoencoderKL(files.config)
    rows = read_rows(tmp_path / "whole" / "log.jsonl")
    deviation = next(
        row["latent_deviation"] for row in rows if row["step"] == 4 and "latent_deviation" in row
    )
    assert average.config.scaling_factor == pytest.approx(1 / deviation, rel=1e-5)
    assert network.apply({"params": params}, np.zeros((1, 32, 32, 3))).shape == (1, 32, 32, 3)
    assert (tmp_path / "whole" / "validation" / "step_0000004.png").is_file()

    middle = str(tmp_path / "whole" / "checkpoint_0000002")
    command.done(tmp_path / "rest", "--ema_decay", "0.9", "--resume_from_checkpoint", middle)
    for part in ("vae", "ema/vae"):
        whole, rest = tensors(tmp_path / "whole", part), tensors(tmp_path / "rest", part)
        assert all(np.array_equal(whole[name], rest[name]) for name in whole)
    resume_by_every_spelling(command, tmp_path / "whole", "--ema_decay", "0.9", spellings=SPELLINGS[:3])


@pytest.mark.parametrize(("ema_decay", "vae"), [(None, "model/vae"), (0.9, "model/ema/vae")])
def test_the_hint_names_the_weights_that_were_validated(ema_decay, vae):
    options = autoencoder.Options(hr_dir=(), vae_dir=Path("v"), output_dir=Path("run"), ema_decay=ema_decay)
    assert f"the autoencoder is in run/c/{vae};" in autoencoder._how_to_use(options, Path("run/c"))


ADVERSARIAL = (
    "--lambda_adv", "0.5", "--adversarial_start", "1", "--discriminator_width", "8", "--latent_noise", "0.2",
    "--optimizer", "muon", "--ema_decay", "0.9",
)  # fmt: skip


def test_a_discriminator_is_trained_saved_and_resumed(command, tmp_path):
    said = command.done(tmp_path / "whole", *ADVERSARIAL)
    assert "adversarial" in said
    rows = {row["step"]: row for row in read_rows(tmp_path / "whole" / "log.jsonl") if "autoencoder" in row}
    weights = [rows[step]["adversarial_weight"] for step in (1, 2, 3, 4)]
    assert weights[0] == rows[1]["discriminator"] == 0 and all(weight > 0 for weight in weights[1:])
    assert all(rows[step]["discriminator"] > 0 for step in (2, 3, 4))
    middle = tmp_path / "whole" / "checkpoint_0000002"
    command.done(tmp_path / "rest", *ADVERSARIAL, "--resume_from_checkpoint", str(middle))
    for path in (tmp_path / "whole", tmp_path / "rest"):
        assert sorted(file.name for file in (checkpoint.find(path, "latest") / "model" / "vae").iterdir()) == [
            "config.json", "diffusion_pytorch_model.safetensors"
        ]  # fmt: skip
    for part in ("vae", "ema/vae"):
        whole, rest = tensors(tmp_path / "whole", part), tensors(tmp_path / "rest", part)
        assert all(np.array_equal(whole[name], rest[name]) for name in whole)
    without = command.refused(
        tmp_path / "other", "--ema_decay", "0.9", "--resume_from_checkpoint", str(middle)
    )
    assert "discriminator's width: 8 before, None now" in without


def test_a_decoder_is_trained_with_the_encoder_as_it_was(command, tmp_path):
    config = tiny.tiny_vae_config()
    tiny.save_network(tmp_path / "given", config, tiny.random_params(config, 3))
    given = load_file(tmp_path / "given" / "diffusion_pytorch_model.safetensors")
    start = ("--vae_dir", str(tmp_path / "given"), "--no_from_scratch", "--train", "decoder")
    command.done(tmp_path / "made", *start)
    found = tensors(tmp_path / "made")
    assert found.keys() == given.keys()
    moved = {name for name in found if not np.array_equal(found[name], given[name])}
    assert moved == {name for name in found if name.startswith("decoder.")}
    again = ("--resume_from_checkpoint", str(tmp_path / "made" / "checkpoint_0000002"))
    command.done(tmp_path / "rest", *start, *again)
    rest = tensors(tmp_path / "rest")
    assert all(np.array_equal(found[name], rest[name]) for name in found)
    whole = start[:3]
    assert "train: decoder before, None now" in command.refused(tmp_path / "whole", *whole, *again)


def test_an_adversarial_loss_that_never_starts_is_noted(command, tmp_path):
    said = command.done(
        tmp_path / "out", "--lambda_adv", "1", "--adversarial_start", "4", "--max_train_steps", "1"
    )
    assert "--adversarial_start 4: training has only 1 steps, so --lambda_adv has no effect" in said


@pytest.mark.slow  # 2026-11: passed
def test_training_continues_from_given_weights(command, tmp_path):
    """At a learning rate of 0, the weights stay the same."""
    config = tiny.tiny_vae_config()
    given = tiny.random_params(config, 3)
    tiny.save_network(tmp_path / "given", config, given)
    start = ("--vae_dir", str(tmp_path / "given"), "--no_from_scratch", "--max_train_steps", "1")
    command.done(tmp_path / "still", *start, "--learning_rate", "0")
    found = tensors(tmp_path / "still")
    for name, tensor in write_base(given, config):
        np.testing.assert_array_equal(found[name], tensor)


# Passed on 2026-11-25 (2 cores, jax 0.10.2, 47 s).
@pytest.mark.slow
def test_devices_share_the_work(command, tmp_path):
    """Two devices with one photograph each and split weights train like one device with two photographs."""
    command.done(tmp_path / "one", "--max_train_steps", "2")
    split = ("--max_train_steps", "2", "--train_batch_size", "1", "--fsdp", "2")
    command.done(tmp_path / "split", *split, devices=2)
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vae_dir", "{root}"), "config.json: not found"),
        (("--no_from_scratch",), "diffusion_pytorch_model.safetensors"),
        (("--crop_size", "20"), "--crop_size 20: expected"),
        (("--hr_dir", "{root}/none"), "no such folder"),
        (("--lambda_kl", "-1"), "--lambda_kl -1"),
        (("--lambda_gradient", "inf"), "--lambda_gradient inf: expected a finite number"),
        (("--lambda_lpips", "1", "--lpips_path", "{root}/none"), "not found"),
        (("--lambda_lpips", "1", "--crop_size", "16"), "too small for LPIPS"),
        (("--latent_noise", "-0.1"), "--latent_noise -0.1"),
        (
            ("--lambda_adv", "1", "--discriminator_width", "12"),
            "--discriminator_width 12: expected a positive multiple",
        ),
        (
            ("--train", "decoder"),
            "--train decoder keeps the encoder of --vae_dir, so it cannot begin --from_scratch",
        ),
    ],
)
def test_mistakes_are_refused(command, tmp_path, flags, message):
    said = command.refused(tmp_path / "out", *(flag.format(root=tmp_path) for flag in flags))
    assert message in said
    assert not list(tmp_path.glob("out/checkpoint*"))
