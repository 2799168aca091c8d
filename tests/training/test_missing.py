"""What a run needs and does not find is named at once, with what to do."""

import dataclasses
import re
from pathlib import Path

import pytest

import tiny_checkpoint as tiny
from tsdsr_jax.commands import distill
from tsdsr_jax.errors import UserError
from tsdsr_jax.training.missing import (
    lack_own_prompts,
    missing_lpips,
    missing_model,
    missing_prompts,
    missing_teacher,
    refuse_missing,
)
from tsdsr_jax.weights.bundled import FOLDER
from tsdsr_jax.weights.prompt_files import save_prompt_embeds


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "photos").mkdir()
    return tmp_path


def options(model: str, **more: object) -> distill.Options:
    flags = distill.Options(
        pretrained_model_name_or_path=model, hr_dir=(Path("photos"),), output_dir=Path("run"), **more
    )
    return flags.prompted(model)


def test_one_message_names_all_that_is_missing_with_what_to_do(here):
    flags = options("sd3", use_teacher_lora=True, teacher_lora_path=Path("teacher"))
    with pytest.raises(UserError) as caught:
        flags.check_files()
    said = str(caught.value)
    assert said.startswith("5 things are missing:\n1. ")
    numbered = re.findall(r"^\d\. (--\w+) (\S+): ", said, re.MULTILINE)
    assert [name for name, _ in numbered] == [
        "--pretrained_model_name_or_path", "--lpips_path", "--null_embedding_dir", "--default_embedding_dir",
        "--teacher_lora_path",
    ]  # fmt: skip
    # The embeddings' commands have a model that exists.
    made = "--null --pretrained_model_name_or_path stabilityai/"
    for words in (
        "hf auth login",
        "lpips.py --network alex",
        f"prompts.py {made}",
        "--default",
        "teacher.py",
    ):
        assert words in said
    assert (
        "--guidance_scale 1 --lambda_lpips 0" in said.splitlines()[-1]
        and str(FOLDER) in said.splitlines()[-1]
    )


def test_missing_photographs_and_sets_are_named_among_the_rest(here):
    flags = dataclasses.replace(
        options("sd3"), hr_dir=(Path("photos"), Path("nowhere")), data_dir=(Path("set"),), lambda_lpips=0.0
    )
    with pytest.raises(UserError) as caught:
        flags.check_files()
    said = str(caught.value)
    assert "\n2. --hr_dir nowhere: no such folder" in said and "\n3. --data_dir set: no such folder" in said
    assert "--hr_dir photos" not in said.splitlines()[1] + said.splitlines()[2]


def test_a_model_that_the_hub_has_is_mentioned_only_beside_others(here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert missing_model("owner/name") == []
    with pytest.raises(UserError) as caught:
        refuse_missing(["one", "two"], "owner/name", "first")
    assert "2 things are missing:\n1. one\n2. two\n3. owner/name is not on this machine" in str(caught.value)
    refuse_missing([], "owner/name", "first")
    with pytest.raises(UserError, match=r"^one$"):
        refuse_missing(["one"], "owner/name", "first")


def test_the_bundled_model_lacks_only_lpips(here):
    with pytest.raises(UserError, match=r"^--lpips_path .*pass --lambda_lpips 0"):
        options(str(FOLDER)).check_files()
    options(str(FOLDER), lambda_lpips=0.0).check_files()


def test_what_is_there_is_not_missing(here):
    (here / "lpips_vgg.safetensors").touch()
    assert missing_lpips(Path("lpips_vgg.safetensors")) == []
    assert "--network vgg" in missing_lpips(Path("my_vgg.safetensors"))[0]
    (here / "teacher.safetensors").touch()
    assert (
        missing_teacher(here) == missing_teacher(here / "teacher.safetensors") == missing_teacher(None) == []
    )
    save_prompt_embeds(here / "dataset" / "null", tiny.random_prompt(tiny.tiny_mmdit_config(), 0))
    assert missing_prompts(options("owner/name"), default=False) == []
    assert len(missing_prompts(options("owner/name"), default=True)) == 1


def test_the_default_prompt_is_needed_only_where_photographs_lack_their_own(here):
    assert lack_own_prompts([here / "photos"]) and not lack_own_prompts([])
    (here / "photos" / "a.safetensors").touch()
    assert not lack_own_prompts([here / "photos"])
