"""The training command as users see it: what it writes, how it resumes, and what it refuses."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from safetensors.numpy import load_file, save_file

import tiny_checkpoint as tiny
import tiny_training
from commands import Command, resume_by_every_spelling
from tsdsr_jax import cli
from tsdsr_jax.commands import distill
from tsdsr_jax.distillation import validation
from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import TRAINING_ARITHMETIC
from tsdsr_jax.models import lora as lora_lib
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL as FlaxVAE
from tsdsr_jax.training import checkpoint, options, sharding, step
from tsdsr_jax.training.log import TIMINGS, read_rows
from tsdsr_jax.training.step import JittedStep, Trainer, TrainState
from tsdsr_jax.weights.prompt_files import save_prompt_embeds
from tsdsr_jax.weights.torch_names import to_tree
from tsdsr_jax.weights.torch_pickle import write_tensor

RANK = tiny_training.RANK


@pytest.fixture(scope="module", autouse=True)
def shared_programs(quick_compilation: None) -> Iterator[None]:
    """Lets runs with equal settings share their traced programs, too."""
    steps, restores = {}, {}
    jit_step, restore = step.jit_step, validation.jit_restore

    def shared_step(trainer: Trainer, mesh: Mesh, shardings: TrainState) -> JittedStep:
        settings = (
            trainer.objective,
            trainer.config,
            tuple(trainer.rates.items()),
            trainer.dynamic_scale,
            mesh,
        )
        return steps.setdefault(settings, jit_step(trainer, mesh, shardings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "jit_step", shared_step)
        patch.setattr(validation, "jit_restore", lambda *key: restores.setdefault(key, restore(*key)))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree, Tree]:
    root = tmp_path_factory.mktemp("training")
    transformer, vae = tiny_training.save_models(root)
    tiny_training.save_set(root / "set", vae, 10)
    tiny_training.save_set(root / "held out", vae, 4, seed=1)
    return root, transformer, vae


@pytest.fixture(scope="module")
def root(models) -> Path:
    """Read only; use `copy` to change it."""
    return models[0]


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root, tmp_path / "copy")


@pytest.fixture(autouse=True)
def one_device_and_own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(options, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Distill(Command):
    def flags(self, output: Path, *more: str, root: Path | None = None) -> Sequence[str]:
        return tiny_training.flags(root or self.root, output, *more)


@pytest.fixture
def command(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Distill:
    return Distill(distill.main, "train/distill.py", root, monkeypatch, capsys)


def state_of(output: Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        return reader.restore(checkpoint.find(output, "latest").resolve() / "state")


def log_of(output: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(output / "log.jsonl")]


def steps_of(output: Path) -> list[dict]:
    """Returns the log without validations."""
    return [row for row in log_of(output) if "student" in row]


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints after 2, 4 and 6. Read only."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp))
        patch.setattr(sys, "argv", ["train/distill.py", *tiny_training.flags(root, output)])
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        distill.main()
        for number, handler in before.items():
            signal.signal(number, handler)
    return output


# --- what a run writes ----------------------------------------------------------------------------


def test_a_run_writes_checkpoints_log_pictures_curves_and_a_summary(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoint_0000002", "checkpoint_0000004", "checkpoint_0000006", "config.json", "curves.png", "log.jsonl",
        "summary.json", "validation",
    ]  # fmt: skip
    rows = log_of(finished)
    steps = [row for row in rows if "tsd" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for name in ("student", "tsd", "mse", "auxiliary", "student_gradient_norm", "auxiliary_gradient_norm"):
        assert all(row[name] > 0 for row in steps), name
    assert all(row["bad_steps"] == 0 and row["learning_rate"] == pytest.approx(1e-3) for row in steps)
    validations = [row for row in rows if "validation_mse" in row]
    assert [row["step"] for row in validations] == [0, 6]
    assert validations[1]["validation_mse"] < validations[0]["validation_mse"]
    picture = Image.open(finished / "validation" / "step_0000006.png")
    assert picture.width > 1000 and picture.height > 4 * 300  # three columns, four samples
    assert json.loads((finished / "summary.json").read_text())["samples"] == 12
    assert json.loads((finished / "config.json").read_text())["use_dasm"] is True


def test_the_exported_adapters_are_the_state_in_pefts_layout(finished):
    state = state_of(finished)
    folder = finished / "checkpoint_0000006" / "lora"
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert sorted(files) == ["transformer.safetensors", "transformer_reg.safetensors", "vae.safetensors"]
    assert all(name.startswith("transformer.") for tensors in files.values() for name in tensors)
    np.testing.assert_array_equal(
        files["transformer.safetensors"]["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"],
        state["trained.student.transformer.blocks_0.attn.to_q.b"][0].T,
    )
    np.testing.assert_array_equal(
        files["vae.safetensors"]["transformer.encoder.conv_in.lora_A.weight"],
        state["trained.student.vae.encoder.conv_in.a"].transpose(3, 2, 0, 1),
    )
    assert any(
        np.abs(leaf).max() > 0
        for name, leaf in state.items()
        if name.startswith("trained.student") and name.endswith(".b")
    )


def test_the_upscaler_loads_the_adapters(finished, root, tmp_path, monkeypatch):
    from tsdsr_jax.commands import upscale

    photo = tmp_path / "photo.png"
    Image.fromarray(tiny.synthetic_photo(32, 32, 5)).save(photo)
    lora = finished / "checkpoint_0000006" / "lora"
    arguments = ["--pretrained_model_name_or_path", root / "sd3", "--lora_dir", lora, "--rank", RANK]
    arguments += [
        "--rank_vae",
        RANK,
        "--embedding_dir",
        root / "default",
        "-i",
        photo,
        "-o",
        tmp_path / "out",
    ]
    arguments += ["--process_size", 64, "--upscale", 2, "--latent_tiled_size", 8, "--latent_tiled_overlap", 2]
    arguments += ["--device", "cpu:0"]
    monkeypatch.setattr(sys, "argv", ["infer/upscale.py", *map(str, arguments)])
    upscale.main()
    assert Image.open(tmp_path / "out" / "photo.png").size == (64, 64)


def test_peft_predicts_the_same_with_the_adapters(finished, root):
    """PEFT loads the adapters of the student, the auxiliary network and the autoencoder into diffusers' networks."""
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("oracle_models")
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    folder, generator = finished / "checkpoint_0000006" / "lora", np.random.default_rng(0)
    state = state_of(finished)

    def tree(prefix: str) -> Tree:
        names = {name: leaf for name, leaf in state.items() if name.startswith(prefix)}
        return to_tree((name.removeprefix(prefix).replace(".", "/"), leaf) for name, leaf in names.items())

    latents = generator.standard_normal((2, 8, 12, 16), np.float32)
    text, pooled = (
        generator.standard_normal((2, 5, 12), np.float32),
        generator.standard_normal((2, 10), np.float32),
    )
    timestep = np.array([1000, 250], np.float32)
    config = tiny.tiny_mmdit_config()
    base = tiny.random_params(config, 1)
    for file, prefix, targets in (
        ("transformer", "trained.student.transformer.", oracle.STUDENT_TARGETS),
        ("transformer_reg", "trained.auxiliary.", oracle.AUX_TARGETS),
    ):
        model = SD3Transformer2DModel.from_pretrained(root / "sd3" / "transformer").eval()
        oracle.load_lora_into(model, folder / f"{file}.safetensors", targets)
        with torch.no_grad():
            expected = model(
                hidden_states=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
                timestep=torch.from_numpy(timestep),
                encoder_hidden_states=torch.from_numpy(text),
                pooled_projections=torch.from_numpy(pooled),
            ).sample.numpy()
        variables = {"params": base, "lora": tree(prefix)}
        found = np.asarray(MMDiT(config).apply(variables, latents, timestep, text, pooled)).transpose(
            0, 3, 1, 2
        )
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), file

    images = np.tanh(generator.standard_normal((1, 32, 48, 3), np.float32))
    vae = AutoencoderKL.from_pretrained(root / "sd3" / "vae").eval()
    oracle.load_lora_into(vae, folder / "vae.safetensors", oracle.VAE_TARGETS)
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).latent_dist.mean.numpy()
    vae_config = tiny.tiny_vae_config()
    variables = {"params": tiny.random_params(vae_config, 2), "lora": tree("trained.student.vae.")}
    found = FlaxVAE(vae_config).apply(variables, images, method="encode").mean
    assert np.abs(np.asarray(found).transpose(0, 3, 1, 2) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_tiny_run_gets_better_on_held_out_photographs(command, root, tmp_path):
    outcome = command(
        tmp_path / "run", "--validation_dir", str(root / "held out"), "--max_train_steps", "60",
        "--checkpointing_steps", "60", "--validation_steps", "60",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    before, after = (row["validation_mse"] for row in log_of(tmp_path / "run") if "validation_mse" in row)
    assert after <= 0.8 * before


# --- resuming -------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, command, tmp_path):
    output = tmp_path / "resumed"
    output.mkdir()
    shutil.copytree(finished / "checkpoint_0000002", output / "checkpoint_0000002")
    shutil.copy(finished / "log.jsonl", output / "log.jsonl")
    outcome = command(output, "--resume_from_checkpoint", "latest", "--dataloader_num_workers", "1")
    assert outcome.status == 0 and "2 steps done, 4 samples seen" in outcome.out
    expected, found = state_of(finished), state_of(output)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert log_of(output) == log_of(finished)


def test_a_run_is_resumed_however_it_is_named(finished, copy, monkeypatch, capsys):
    command = Distill(distill.main, "train/distill.py", copy, monkeypatch, capsys)
    resume_by_every_spelling(command, finished)


def test_latest_with_nothing_there_starts_new_and_a_signal_saves(command, tmp_path, monkeypatch):
    put, calls = distill.Step.put, []

    def stop_at_the_third(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return put(self, batch)

    monkeypatch.setattr(distill.Step, "put", stop_at_the_third)
    outcome = command(tmp_path / "run", "--resume_from_checkpoint", "latest", "--checkpointing_steps", "100")
    assert "nothing to resume" in outcome.out and outcome.status == 143
    assert "stopped after 3 of 6 steps; saved" in outcome.out
    assert checkpoint.find(tmp_path / "run", "latest").name == "checkpoint_0000003"


def test_earlier_work_is_not_overwritten(finished, command, tmp_path):
    assert "holds checkpoint_0000006 of an earlier run" in command.refused(finished)
    older = str(finished / "checkpoint_0000002")
    assert "later than checkpoint_0000002" in command.refused(finished, "--resume_from_checkpoint", older)
    outcome = command(finished, "--resume_from_checkpoint", "latest")
    assert outcome.status == 0 and "all 6 steps are done" in outcome.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rank", "3"), "rank: 2 before, 3 now"),
        (("--rank_lora", "3"), "rank_lora: 2 before, 3 now"),
        (("--seed", "5"), "seed: 0 before, 5 now"),
        (("--ema_decay", "0.9"), "ema: False before, True now"),
        (("--data_dir", "OTHER"), "data set: 10 samples before, 14 samples now"),
        (("--pretrained_model_name_or_path", "OTHER"), "autoencoder: "),
        (("--pretrained_model_name_or_path", "OTHER SCHEDULE"), "schedule's shift: 3.0 before, 1.0 now"),
        (("--no_use_default_prompt",), "default prompt: "),
    ],
)
def test_another_run_is_not_resumed_and_what_differs_is_said(finished, root, command, tmp_path, flags, words):
    if flags[1:] == ("OTHER SCHEDULE",):
        flags = (flags[0], str(tiny_training.with_shift(root / "sd3", tmp_path / "sd3", 1.0)))
    if flags[1:] == ("OTHER",):
        other = root / "held out"
        if flags[0] != "--data_dir":
            other = tmp_path / "sd3"
            tiny.save_checkpoint(other, tiny.tiny_mmdit_config(), tiny.tiny_vae_config())
            params = tiny.random_params(tiny.tiny_vae_config(), 77)
            tiny.save_network(other / "vae", tiny.tiny_vae_config(), params)
        flags = (flags[0], str(other))
    said = command.refused(
        tmp_path / "out", *flags, "--resume_from_checkpoint", str(finished / "checkpoint_0000004")
    )
    assert "belongs to a different run" in said and words in said, said
    # A different data set is reported twice, by its size and by its content; everything else once.
    assert said.count(" before, ") == (2 if flags[0] == "--data_dir" else 1), said


def test_a_checkpoint_from_before_the_schedule_was_kept_is_resumed(finished, command, tmp_path):
    shutil.copytree(finished / "checkpoint_0000004", tmp_path / "out" / "checkpoint_0000004")
    (path,) = (file for file in (tmp_path / "out").rglob("meta/*") if "schedule" in file.read_text())
    meta = json.loads(path.read_text())
    rank = meta["identity"].pop("rank")
    del meta["identity"]["schedule's shift"]
    path.write_text(json.dumps(meta))
    said = command.refused(tmp_path / "out", "--resume_from_checkpoint", "latest")
    assert "rank: None before, 2 now" in said and said.count(" before, ") == 1
    meta["identity"]["rank"] = rank
    path.write_text(json.dumps(meta))
    assert command(tmp_path / "out", "--resume_from_checkpoint", "latest").status == 0


def test_a_run_that_cannot_continue_bit_for_bit_says_so(finished, command, tmp_path):
    shutil.copytree(finished / "checkpoint_0000004", tmp_path / "out" / "checkpoint_0000004")
    (path,) = (file for file in (tmp_path / "out").rglob("meta/*") if "versions" in file.read_text())
    made = json.loads(path.read_text())
    arithmetic = f"training arithmetic: None before, {TRAINING_ARITHMETIC} now"
    changes = {arithmetic: "training arithmetic", "jax: 0.1 before": "jax"}
    for words, name in changes.items():
        versions = {**made["versions"], name: "0.1"}
        if name != "jax":
            del versions[name]
        path.write_text(json.dumps(made | {"versions": versions}))
        said = command(tmp_path / "out", "--resume_from_checkpoint", "latest", "--max_train_steps", "5").out
        assert f"note: steps round differently than before the checkpoint ({words}" in said
        shutil.rmtree(tmp_path / "out" / "checkpoint_0000005")


def test_a_last_checkpoint_without_its_loras_is_not_recommended(finished, command, tmp_path, monkeypatch):
    shutil.copytree(finished / "checkpoint_0000004", tmp_path / "out" / "checkpoint_0000004")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_file", full)
    more = ("--resume_from_checkpoint", "latest", "--max_train_steps")
    outcome = command(tmp_path / "out", *more, "5")
    assert outcome.status == 1 and "upscale.py" not in outcome.out + outcome.err
    assert (
        "checkpoint_0000005: can be resumed, but its lora could not be written (No space left on"
        in outcome.err
    )
    monkeypatch.undo()
    assert command(tmp_path / "out", *more, "6").status == 0
    assert (tmp_path / "out" / "checkpoint_0000006" / "lora" / "transformer.safetensors").is_file()


def test_other_changes_are_reported(finished, command, tmp_path):
    path = str(finished / "checkpoint_0000004")
    said = command(
        tmp_path / "out", "--resume_from_checkpoint", path, "--max_bad_steps", "7", "--logging_steps", "2"
    ).out
    assert "note: changed since the checkpoint: --max_bad_steps: 20 before, 7 now" in said
    assert said.count("changed since") == 1  # nothing depends on the logging steps
    assert "round differently" not in said


def test_a_finished_run_can_be_trained_longer(finished, command, tmp_path):
    output = shutil.copytree(finished, tmp_path / "longer")
    outcome = command(output, "--resume_from_checkpoint", "latest", "--max_train_steps", "7")
    assert outcome.status == 0 and checkpoint.find(output, "latest").name == "checkpoint_0000007"
    assert [row["step"] for row in log_of(output) if "tsd" in row] == [1, 2, 3, 4, 5, 6, 7]


def test_resuming_in_another_folder_copies_the_log_and_keeps_other_runs(finished, command, tmp_path):
    wanted = ("--resume_from_checkpoint", str(finished / "checkpoint_0000004"))
    other = tmp_path / "other"
    shutil.copytree(finished / "checkpoint_0000002", other / "checkpoint_0000002")
    assert "holds checkpoint_0000002 of another run" in command.refused(other, *wanted)
    assert command(tmp_path / "new", *wanted).status == 0
    assert log_of(tmp_path / "new") == log_of(finished)
    assert sorted(path.name for path in (tmp_path / "new").glob("checkpoint_*")) == ["checkpoint_0000006"]


def test_another_number_of_images_per_step_is_reported_or_refused(finished, command, tmp_path, monkeypatch):
    wanted = ("--resume_from_checkpoint", str(finished / "checkpoint_0000004"), "--train_batch_size", "4")
    outcome = command(tmp_path / "steps", *wanted)
    assert outcome.status == 0 and "note: 4 images per step, 2 before the checkpoint" in outcome.out
    assert json.loads((tmp_path / "steps" / "summary.json").read_text())["samples"] == 4 * 2 + 2 * 4
    by_epochs = [
        flag for flag in tiny_training.flags(finished, tmp_path) if flag not in ("--max_train_steps", "6")
    ]
    monkeypatch.setattr(tiny_training, "flags", lambda root, output, *more: [
        *by_epochs, "--output_dir", str(output), "--pretrained_model_name_or_path", str(root / "sd3"), "--data_dir",
        str(root / "set"), "--null_embedding_dir", str(root / "null"), "--default_embedding_dir", str(root / "default"),
        "--validation_steps", "6", *more,
    ])  # fmt: skip
    by_epochs.remove("--data_dir")
    by_epochs.remove(str(finished / "set"))
    by_epochs.remove("--validation_steps")
    said = command.refused(tmp_path / "epochs", "--num_train_epochs", "3", *wanted)
    assert "had 2 images per step, this run has 4" in said and "--max_train_steps" in said


@pytest.mark.slow  # half a minute; 2026-11-26: passed
def test_another_precision_gets_its_own_loss_scale(finished, command, tmp_path):
    wanted = ("--resume_from_checkpoint", str(finished / "checkpoint_0000004"))
    assert command(tmp_path / "half", *wanted, "--mixed_precision", "fp16").status == 0
    scales = [row["loss_scale"] for row in log_of(tmp_path / "half") if "tsd" in row]
    assert scales[:4] == [1, 1, 1, 1] and scales[4] == 65536


ADVERSARIAL = ("--lambda_adv", "0.1", "--adversarial_start", "1", "--discriminator_width", "8")


def test_a_discriminator_is_trained_saved_and_resumed(command, tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    outcome = command(whole, *ADVERSARIAL, "--max_train_steps", "4")
    assert outcome.status == 0 and " adversarial " in outcome.out and " discriminator " in outcome.out, (
        outcome.err
    )
    rows = steps_of(whole)
    # The discriminator learns from the first step on, the student is moved by it from the second.
    assert all(row["discriminator_update_norm"] > 0 for row in rows)
    for row, weight in zip(rows, (0, 0.1, 0.1, 0.1), strict=True):
        terms = row["mse"] + row["tsd"] + weight * row["adversarial"]
        assert row["student"] == pytest.approx(terms, rel=1e-5)
    middle = str(whole / "checkpoint_0000002")
    outcome = command(rest, *ADVERSARIAL, "--max_train_steps", "4", "--resume_from_checkpoint", middle)
    assert outcome.status == 0, outcome.err
    expected, found = state_of(whole), state_of(rest)
    assert any("discriminator" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    files = {path.name for path in (whole / "checkpoint_0000004" / "lora").glob("*.safetensors")}
    assert files == {"transformer.safetensors", "vae.safetensors", "transformer_reg.safetensors"}
    said = command.refused(tmp_path / "other", "--resume_from_checkpoint", middle)
    assert "discriminator's width: 8 before, None now" in said


# --- options --------------------------------------------------------------------------------------


def test_other_precisions_average_accumulation_teacher_and_start(finished, root, models, command, tmp_path):
    """Tests everything that the other runs do not; fp16 uses a loss scale, and the average has its own files."""
    _, transformer, _ = models
    tiny.save_peft(
        tmp_path / "teacher.safetensors",
        tiny.random_lora(transformer, lora_lib.STUDENT_TARGETS, 3, 8),
        tiny.tiny_mmdit_config(),
    )
    outcome = command(
        tmp_path / "run", "--mixed_precision", "fp16", "--ema_decay", "0.5", "--gradient_accumulation_steps", "2",
        "--use_teacher_lora", "--teacher_lora_path", str(tmp_path), "--use_random_bias", "--gradient_checkpointing",
        "--checkpoint_path", str(finished / "checkpoint_0000006" / "lora"), "--no_use_default_prompt", "--split_guidance",
        "--weighting_scheme", "mode", "--lr_scheduler", "cosine_with_restarts", "--lr_warmup_steps", "1",
        "--validation_dir", str(root / "held out"), "--max_train_steps", "5", "--set_grads_to_none",
        "--checkpointing_steps", "5", *ADVERSARIAL,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "--set_grads_to_none has no effect" in outcome.out and "starting from" in outcome.out
    steps = [row for row in log_of(tmp_path / "run") if "tsd" in row]
    # Where a scaled gradient overflows, the scale halves, nothing moves, and the learning rate stays where it was.
    scale, good = 65536, 0
    for row in steps:
        assert row["loss_scale"] == scale and (row["learning_rate"] == 0) == (good == 0)
        scale, good = (scale / 2, good) if row["bad_steps"] else (scale, good + 1)
        assert (row["student_update_norm"] > 0) == (not row["bad_steps"] and row["learning_rate"] > 0)
    assert good >= 3
    folder = tmp_path / "run" / "checkpoint_0000005" / "lora"
    student, average = (load_file(path / "transformer.safetensors") for path in (folder, folder / "ema"))
    started = load_file(finished / "checkpoint_0000006" / "lora" / "transformer.safetensors")
    moved = {name for name in student if np.abs(student[name] - started[name]).max() > 0}
    assert len(moved) > len(student) / 2
    for name in moved:
        # Between the start and the end, as an average is.
        assert (
            np.abs(average[name] - started[name]).max() < np.abs(student[name] - started[name]).max() * 1.01
        )


def test_layers_of_their_own_and_a_merged_teacher_give_the_same_losses(command, models, tmp_path):
    """In float32, where merging rounds nothing away; the state is in stacks either way, so either resumes the other."""
    _, transformer, _ = models
    adapter = tiny.random_lora(transformer, lora_lib.STUDENT_TARGETS, 3, 8)
    tiny.save_peft(tmp_path / "teacher.safetensors", adapter, tiny.tiny_mmdit_config())
    teacher = "--use_teacher_lora", "--teacher_lora_path", str(tmp_path), "--max_train_steps", "2"
    for output, more in (("loop", ()), ("apart", ("--no_scan_layers", "--merge_teacher_lora"))):
        outcome = command(tmp_path / output, *teacher, *more)
        assert outcome.status == 0, outcome.err
        assert ("100.0% of its change is left in float32" in outcome.out) == bool(more)
    for made, wanted in zip(steps_of(tmp_path / "apart"), steps_of(tmp_path / "loop"), strict=True):
        assert made.keys() == wanted.keys()
        for name in ("student", "tsd", "auxiliary", "student_gradient_norm", "auxiliary_gradient_norm"):
            assert made[name] == pytest.approx(wanted[name], rel=1e-4), name
    made, wanted = state_of(tmp_path / "apart"), state_of(tmp_path / "loop")
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, wanted)
    resumed = command(
        tmp_path / "apart", *teacher, "--max_train_steps", "3", "--resume_from_checkpoint", "latest"
    )
    assert resumed.status == 0 and "2 steps done" in resumed.out


def test_lpips_is_needed_unless_left_out(command, tmp_path):
    said = command.refused(
        tmp_path / "run", "--lambda_lpips", "1", "--lpips_path", str(tmp_path / "vgg.safetensors")
    )
    assert "pass --lambda_lpips 0" in said and "convert/lpips.py --network vgg" in said


def test_lpips_trains_where_its_weights_are(command, tmp_path, root, models):
    from tsdsr_jax.weights.lpips_files import param_shapes, save_lpips

    generator = np.random.default_rng(0)
    params = {
        path: np.abs(generator.standard_normal(shape)).astype(np.float32) / np.sqrt(np.prod(shape[:-1]) or 1)
        for path, shape in param_shapes("alex").items()
    }
    save_lpips(tmp_path / "lpips.safetensors", "alex", to_tree(params.items()))
    outcome = command(
        tmp_path / "run", "--lambda_lpips", "2", "--lpips_path", str(tmp_path / "lpips.safetensors"),
        "--max_train_steps", "2", "--lambda_tsd", "0",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    steps = [row for row in log_of(tmp_path / "run") if "lpips" in row]
    assert len(steps) == 2
    for row in steps:
        assert row["lpips"] > 0 and row["student"] == pytest.approx(2 * row["lpips"] + row["mse"], rel=1e-5)


def test_the_auxiliary_network_is_left_alone_without_tsd_and_rate(command, tmp_path):
    """Also its optimizer: zeros would wear out the moments, and the first steps of a run with TSD would be too large."""
    outcome = command(
        tmp_path / "run", "--lambda_tsd", "0", "--learning_rate_reg", "0", "--max_train_steps", "2"
    )
    assert outcome.status == 0, outcome.err
    assert all("auxiliary" not in row for row in log_of(tmp_path / "run"))
    counts = {name: int(leaf) for name, leaf in state_of(tmp_path / "run").items() if name.endswith("count")}
    assert {count for name, count in counts.items() if name.startswith("optimizer.auxiliary")} == {0}
    assert {count for name, count in counts.items() if name.startswith("optimizer.student")} == {2}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rank", "0"), "--rank 0: expected at least 1"),
        (("--max_train_steps", "0"), "--max_train_steps 0"),
        (("--learning_rate", "nan"), "--learning_rate nan"),
        (("--max_grad_norm", "0"), "--max_grad_norm 0: expected more than 0"),
        (("--ema_decay", "1"), "--ema_decay 1: expected at least 0 and less than 1"),
        (("--lambda_vsd", "1.5"), "expected a share from 0 to 1"),
        (("--first_index", "900", "--last_index", "800"), "expected first ≤ last ≤ 998"),
        (("--lambda_tsd", "0", "--lambda_mse", "0"), "nothing to train"),
        (("--profile_steps", "5"), "--profile_steps 5: expected the first and the last step, such as 10:15"),
        (("--profile_steps", "7:5"), "--profile_steps 7:5: expected"),
        (("--lambda_adv", "-1"), "--lambda_adv -1: expected at least 0"),
        (("--discriminator_width", "12"), "--discriminator_width 12: expected a positive multiple of 8"),
        (("--use_teacher_lora",), "give the LoRA with --teacher_lora_path"),
        (
            ("--use_teacher_lora", "--teacher_lora_path", "/nowhere.safetensors"),
            "/nowhere.safetensors: not found",
        ),
        (("--checkpoint_path", "/nowhere"), "--checkpoint_path /nowhere: no such folder"),
        (("--null_embedding_dir", "/nowhere"), "/nowhere: no such folder of prompt embeddings"),
        (("--data_dir", "/nowhere"), "/nowhere: no such folder; expected a prepared set"),
        (("--pretrained_model_name_or_path", "/nowhere"), "/nowhere: no such folder"),
        (("--resume_from_checkpoint", "/nowhere"), "--resume_from_checkpoint /nowhere: no such checkpoint"),
        (("--fsdp", "2"), "--fsdp 2: 1 devices cannot be split into groups of 2"),
        (("--num_processes", "2"), "--num_processes given without --coordinator_address and --process_id"),
        (("--report_to", "tensorbord"), "expected one of none, tensorboard, wandb or all"),
        (("--use_dasms",), "did you mean --use_dasm?"),
        (("--guidance_scale", "nan"), "--guidance_scale nan: expected a finite number"),
        (("--adam_epsilon", "0"), "--adam_epsilon 0: expected more than 0"),
        (
            ("--adam_epsilon", "1e-40"),
            "--adam_epsilon 1e-40: expected more than 0; this is too small for float32",
        ),
        (
            ("--adam_epsilon", "1e-46"),
            "--adam_epsilon 1e-46: expected more than 0; this is too small for float32",
        ),
        (("--max_grad_norm", "inf"), "--max_grad_norm inf: expected a finite number"),
        (("--learning_rate", "1e39"), "--learning_rate 1e+39: expected a finite number in float32"),
        (("--adam_beta2", "0.99999999"), "--adam_beta2 0.99999999: expected at least 0 and less than 1"),
        (("--seed", "4294967296"), "--seed 4294967296: expected less than 2**32"),
        (("--use_random_bias", "--dasm_stride", "12"), "expected at least 26 with --use_random_bias"),
        (
            ("--output_dir", "/dev/null/run"),
            "--output_dir /dev/null/run: /dev/null is a file; expected a folder",
        ),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, flags, words):
    said = command.refused(tmp_path / "run", *flags)
    assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


# --- where the samples come from ------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.save_photos(tmp_path_factory.mktemp("photographs"), 10)


def on_the_way(photos: Path) -> tuple[str, ...]:
    return "--hr_dir", str(photos), "--crop_size", "32"


def test_photographs_are_degraded_and_encoded_on_the_way(command, photos, tmp_path):
    """A run resumed with two reader processes ends like one that uses threads throughout."""
    command(tmp_path / "whole", *on_the_way(photos))
    middle = str(tmp_path / "whole" / "checkpoint_0000002")
    flags = (*on_the_way(photos), "--resume_from_checkpoint", middle)
    outcome = command(tmp_path / "rest", *flags, "--dataloader_num_workers", "2")
    assert outcome.status == 0 and "2 steps done, 4 samples seen" in outcome.out
    assert steps_of(tmp_path / "rest")[-4:] == steps_of(tmp_path / "whole")[-4:]
    whole, rest = state_of(tmp_path / "whole"), state_of(tmp_path / "rest")
    assert all(np.array_equal(whole[name], rest[name]) for name in whole)
    said = command.refused(tmp_path / "other", *flags, "--no_sharpen_gt")
    assert "sharpening: True before, False now" in said


@pytest.mark.slow  # half a minute; 2026-11-26: passed
def test_a_prepared_set_gives_the_batches_of_training_on_the_way(
    command, root, photos, tmp_path, monkeypatch
):
    """In the first epoch and with a certain posterior, the images are the same; all have the default prompt."""
    from tsdsr_jax.commands import prepare

    here = tmp_path / "root"
    for name in ("sd3", "default", "null"):
        shutil.copytree(root / name, here / name)
    config = tiny.tiny_vae_config()
    params = tiny.random_params(config, 2)
    last = params["encoder"]["conv_out"]
    last["kernel"][..., config.latent_channels :] = 0
    last["bias"][config.latent_channels :] = -30
    tiny.save_network(here / "sd3" / "vae", config, params)
    flags = [
        "--hr_dir", str(photos), "--crop_size", "32", "--output_dir", str(here / "set"), "--dataloader_num_workers",
        "0", "--pretrained_model_name_or_path", str(here / "sd3"), "--default_embedding_dir", str(here / "default"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train/prepare.py", *flags])
    prepare.main()
    for name, data in (("way", on_the_way(photos)), ("shards", ())):
        assert command(tmp_path / name, *data, "--max_train_steps", "2", root=here).status == 0
    way, shards = (steps_of(tmp_path / name) for name in ("way", "shards"))
    assert len(way) == 2 and way[0]["mse"] != pytest.approx(way[1]["mse"], rel=1e-2)
    for ours, theirs in zip(way, shards, strict=True):
        assert ours["mse"] == pytest.approx(theirs["mse"], rel=1e-3)  # prepared latents are float16


def test_photographs_that_cannot_be_used_are_reported(command, root, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    Image.fromarray(tiny.synthetic_photo(10, 10, 0)).save(folder / "small.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    whole = (folder / "1" / "4.png").read_bytes()
    (folder / "1" / "4.png").write_bytes(whole[: len(whole) // 2])
    outcome = command(tmp_path / "run", *on_the_way(folder), "--max_bad_samples", "0.2")
    assert outcome.status == 0 and "10 samples, 6 steps" in outcome.out
    assert "1 photographs are smaller than the crops of 32×32" in outcome.out and "small.png" in outcome.out
    assert "1 images cannot be read" in outcome.out and "broken.jpg" in outcome.out
    assert "left out: " in outcome.out and "4.png" in outcome.out and "1 samples were left out" in outcome.out
    said = command.refused(tmp_path / "no", *on_the_way(folder), "--data_dir", str(root / "set"))
    assert "either prepared sets with --data_dir or folders of photographs with --hr_dir" in said
    (tmp_path / "empty").mkdir()
    assert "no images in it" in command.refused(tmp_path / "no", *on_the_way(tmp_path / "empty"))


def test_a_set_of_another_base_is_refused(command, root, tmp_path):
    other = tmp_path / "sd3"
    tiny.save_checkpoint(other, tiny.tiny_mmdit_config(), tiny.tiny_vae_config())
    params = tiny.random_params(tiny.tiny_vae_config(), 77)
    tiny.save_network(other / "vae", tiny.tiny_vae_config(), params)
    said = command.refused(tmp_path / "run", "--pretrained_model_name_or_path", str(other))
    assert "photo 00.png: its latent_hr is not what this model's autoencoder makes of its photograph" in said


# --- data that does not fit -----------------------------------------------------------------------


def test_a_corrupt_image_is_left_out_by_name(command, copy, tmp_path):
    bad = copy / "set" / "gt" / "photo 03.png"
    bad.write_bytes(b"no image")
    outcome = command(tmp_path / "run", "--max_bad_samples", "0.2", root=copy)
    assert outcome.status == 0
    # Reported once when it is first read, and once at the end.
    assert outcome.out.count("left out: ") == 2 and "1 samples were left out" in outcome.out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_samples"] == [
        command.relative(str(copy / "set" / "lr_bicubic" / "photo 03.png"))
    ]
    said = command.refused(tmp_path / "strict", root=copy)
    assert (
        "1 of 10 samples cannot be used, more than --max_bad_samples 0.01" in said and "photo 03.png" in said
    )


def wrong_latents(root: Path) -> str:
    for path in (root / "set" / "latent_hr").iterdir():
        write_tensor(path, np.zeros((1, 4, 4, 4), np.float32))
    return "latent_hr has shape (4, 4, 4), but images of 32×32 have latents (16, 4, 4) with this model"


def wrong_widths(root: Path) -> str:
    for path in (root / "set" / "prompt_embeds").iterdir():
        write_tensor(path, np.zeros((1, 5, 13), np.float16))
    return "prompt embeddings have widths 13 and 10 (pooled), but the transformer takes 12 and 10"


def wrong_length(root: Path) -> str:
    prompt = tiny.random_prompt(tiny.tiny_mmdit_config(), 1)
    save_prompt_embeds(root / "null", dataclasses.replace(prompt, prompt=prompt.prompt[:3]))
    return "its embedding has 3 tokens, the images' have 5"


def odd_size(root: Path) -> str:
    for folder in ("gt", "lr_bicubic"):
        for path in (root / "set" / folder).iterdir():
            Image.open(path).resize((40, 24)).save(path)
    return "the training images are 40×24; sides must be multiples of 16"


def no_prompts(root: Path) -> str:
    shutil.rmtree(root / "set" / "prompt_embeds")
    return "prompt_embeds/ lacks photo 00"


def half_lora(root: Path) -> str:
    folder = root / "lora"
    names = {"transformer": tiny.tiny_mmdit_config(), "vae": tiny.tiny_vae_config()}
    targets = {"transformer": lora_lib.ATTENTION_TARGETS, "vae": lora_lib.VAE_ENCODER_TARGETS}
    for name, config in names.items():
        adapter = tiny.random_lora(tiny.random_params(config, 1), targets[name], RANK, 3)
        tiny.save_peft(folder / f"{name}.safetensors", adapter, config)
    return "transformer.safetensors: does not adapt the modules that are trained; missing: "


@pytest.mark.parametrize(
    "change", [wrong_latents, wrong_widths, wrong_length, odd_size, no_prompts, half_lora]
)
def test_data_that_does_not_fit_is_refused_before_anything_is_loaded(
    command, copy, tmp_path, change, monkeypatch
):
    expected = change(copy)
    monkeypatch.setattr(distill.Networks, "load", lambda *_: pytest.fail("weights were loaded"))
    more = ("--checkpoint_path", str(copy / "lora")) if change is half_lora else ()
    said = command.refused(tmp_path / "run", *more, root=copy)
    assert expected in said, said


def test_a_lora_of_another_rank_says_which_flag_fits(command, finished, tmp_path):
    folder = str(finished / "checkpoint_0000006" / "lora")
    said = command.refused(tmp_path / "run", "--checkpoint_path", folder, "--rank", "4")
    assert "but --rank is 4; pass --rank 2" in said


def test_adapters_that_are_not_finite_are_refused(command, finished, tmp_path):
    folder = shutil.copytree(finished / "checkpoint_0000006" / "lora", tmp_path / "lora")
    tensors = load_file(folder / "vae.safetensors")
    tensors[next(iter(tensors))][:] = np.nan
    save_file(tensors, folder / "vae.safetensors")
    said = command.refused(tmp_path / "run", "--checkpoint_path", str(folder))
    assert "vae.safetensors: has values that are NaN or infinite in 1 tensor: transformer.encoder." in said


def test_validation_samples_of_another_size_are_left_out_with_a_message(command, copy, tmp_path):
    for name in ("photo 01", "photo 02"):
        for folder in ("gt", "lr_bicubic"):
            path = copy / "held out" / folder / f"{name}.png"
            Image.open(path).resize((48, 48)).save(path)
    outcome = command(
        tmp_path / "run", "--validation_dir", str(copy / "held out"), "--max_train_steps", "1", root=copy
    )
    assert outcome.status == 0 and outcome.out.count("left out of validation: ") == 2


def test_a_student_that_explodes_stops_with_its_state_saved(command, finished, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(finished / "checkpoint_0000006" / "lora", folder)
    tensors = load_file(folder / "transformer.safetensors")
    save_file(
        {name: tensor * np.float32(1e30) for name, tensor in tensors.items()},
        folder / "transformer.safetensors",
    )
    said = command.refused(
        tmp_path / "run", "--checkpoint_path", str(folder), "--max_bad_steps", "2", "--logging_steps", "1"
    )
    assert "2 steps in a row had non-finite gradients or updates" in said
    assert checkpoint.find(tmp_path / "run", "latest").name == "checkpoint_0000002"


# Every flag of the original's training script.
ORIGINAL = """
pretrained_model_name_or_path revision variant teacher_lora_path checkpoint_path default_embedding_dir
null_embedding_dir output_dir logging_dir log_name log_code use_default_prompt use_dasm use_teacher_lora
use_random_bias guidance_scale weighting_scheme logit_mean logit_std mode_scale rank rank_lora rank_vae
train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps gradient_checkpointing
dataloader_num_workers mixed_precision seed learning_rate learning_rate_reg lr_scheduler lr_warmup_steps
lr_num_cycles lr_power max_grad_norm adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
checkpointing_steps validation_steps checkpoints_total_limit resume_from_checkpoint report_to optimizer
local_rank set_grads_to_none
"""
PUBLISHED = """
--pretrained_model_name_or_path=sd3 --data_dir=set --teacher_lora_path=teacher --output_dir=out
--train_batch_size=2 --rank=64 --rank_vae=64 --rank_lora=64 --num_train_epochs=200
--checkpointing_steps=5000 --validation_steps=500 --max_train_steps=200000 --learning_rate=5e-06
--learning_rate_reg=1e-06 --lr_scheduler=cosine_with_restarts --lr_warmup_steps=3000 --seed=43
--use_default_prompt --use_teacher_lora --use_random_bias --report_to=wandb --log_code --log_name=run
--gradient_accumulation_steps=1 --resume_from_checkpoint=latest --guidance_scale=7.5
"""


def test_options_of_the_original_are_all_there():
    assert set(ORIGINAL.split()) <= {field.name for field in dataclasses.fields(distill.Options)}


def test_the_published_command_is_understood():
    """The flags are as published, with paths added."""
    options = cli.parse(distill.Options, description="", argv=PUBLISHED.split())
    assert options.learning_rate == 5e-6 and options.rank_lora == 64 and options.report_to == "wandb"
    notes = options.all_notes(200_000)
    assert any("--use_random_bias has no effect without --use_dasm" in note for note in notes)


@pytest.mark.parametrize(("given", "used"), [("AdamW", "adamw"), ("adamw", "adamw"), ("muon", "muon")])
def test_optimizers_by_name(given, used):
    options = cli.parse(distill.Options, description="", argv=[*PUBLISHED.split(), "--optimizer", given])
    assert options.optimizer_config(1).optimizer == used == options.kept()["optimizer"]


def test_missing_trackers_are_refused_before_anything_starts(command, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        distill.Options(pretrained_model_name_or_path="", data_dir=(), report_to="wandb").check()
