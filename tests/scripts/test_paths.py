"""Every path flag of every script: taken as one, wherever the user stands and however the path is written."""

from collections.abc import Callable

import pytest

from tsdsr_jax import cli
from tsdsr_jax.commands import (
    app,
    autoencoder,
    convert_lora,
    convert_lpips,
    convert_prompts,
    convert_sd3,
    distill,
    evaluate,
    prepare,
    teacher,
    upscale,
)
from tsdsr_jax.flags import flags_of

RUN = "output_dir logging_dir resume_from_checkpoint validation_dir"
DATA = "data_dir hr_dir default_embedding_dir null_embedding_dir"
MODEL = "pretrained_model_name_or_path"
UPSCALING = f"{MODEL} lora_dir embedding_dir"
PATHS = (
    (autoencoder.Options, f"{RUN} hr_dir vae_dir lpips_path"),
    (distill.Options, f"{RUN} {DATA} {MODEL} teacher_lora_path checkpoint_path lpips_path"),
    (teacher.Options, f"{RUN} {DATA} {MODEL} checkpoint_path"),
    (prepare.Options, f"{MODEL} hr_dir output_dir default_embedding_dir text_encoder_path preview"),
    (upscale.Options, f"{UPSCALING} input_dir output_dir report"),
    (app.Options, UPSCALING),
    (evaluate.Options, "inp_imgs gt_imgs niqe_params lpips_weights log report lr_imgs"),
    (convert_sd3.Options, "input output lora_dir embedding_dir"),
    (convert_lora.Options, "input output base"),
    (convert_prompts.Options, f"{MODEL} output input prompt_file"),
    (convert_lpips.Options, "backbone lin output"),
)


@pytest.mark.parametrize(("options", "names"), PATHS, ids=lambda each: getattr(each, "__module__", ""))
def test_the_home_folder_is_understood_in_every_path(monkeypatch, options: Callable, names: str):
    """As `--flag=~/x`, which a shell leaves alone; all else stays as the user wrote it."""
    monkeypatch.setenv("HOME", "/home/me")
    flags = flags_of(options)
    assert {flag.name for flag in flags if flag.takes_paths} == set(names.split())
    needed = [word for flag in flags if flag.name == "network" for word in ("--network", "alex")]
    for written, read in (
        ("~/a b", "/home/me/a b"),
        ("../x/../~y", "../x/../~y"),
        ("./~", "./~"),
        ("x/", "x/"),
    ):
        given = [f"--{name}={written}" for name in names.split()]
        found = cli.parse(options, description="", argv=[*needed, *given])
        for name in names.split():
            value = getattr(found, name)
            (value,) = value if isinstance(value, tuple) else (value,)
            assert value == type(value)(read), name


def test_other_flags_keep_their_tilde():
    argv = ["--output", "x", "--prompt", "~/a cat"]
    assert cli.parse(convert_prompts.Options, description="", argv=argv).prompt == "~/a cat"
