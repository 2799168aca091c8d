"""Prompt embeddings: `.pt` files read without torch, both layouts on disk, and SD3's text encoders against diffusers."""

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tiny_text_encoders import save_clip, save_text_encoders
from tsdsr_jax.commands import convert_prompts as script
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights import prompt_files, text_encoders
from tsdsr_jax.weights.prompt_files import PromptEmbeds, check_widths, load_prompt_embeds, save_prompt_embeds
from tsdsr_jax.weights.text_encoders import EncoderOptions, encode_prompts, find_encoders
from tsdsr_jax.weights.torch_pickle import STORAGE_DTYPES, read_tensor, write_tensor

ROOT = Path(__file__).parents[2]
REBUILD = "torch._utils _rebuild_tensor_v2"


# --- `.pt` files made by hand, so that this part is tested where torch is not installed ---


def op_global(name: str) -> bytes:
    module, attribute = name.split(" ")
    return f"c{module}\n{attribute}\n".encode()


def op_text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def op_ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor_ops(storage: str, elements: int, shape, strides, offset=0, rebuild=REBUILD, hooks=None) -> bytes:
    """The opcodes that leave one tensor on the unpickler's stack."""
    reference = b"(" + op_text("storage") + op_global(f"torch {storage}") + op_text("0") + op_text("cpu")
    reference += b"J" + struct.pack("<i", elements) + b"tQ"
    hooks = hooks or op_global("collections OrderedDict") + b")R"
    arguments = b"(" + reference + b"J" + struct.pack("<i", offset) + op_ints(shape) + op_ints(strides)
    return op_global(rebuild) + arguments + b"\x89" + hooks + b"tR"


def write_pt(file: Path, ops: bytes, data: bytes = b"", byteorder: bytes | None = b"little") -> Path:
    """Writes a `.pt` archive whose pickle is `ops` and whose only storage is `data`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + ops + b".")
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", b"3\n")
        if byteorder:
            archive.writestr("archive/byteorder", byteorder)
    return file


def write_array(file: Path, array: np.ndarray) -> Path:
    """Writes a float32 array as torch.save would."""
    strides = tuple(stride // 4 for stride in array.strides)
    ops = tensor_ops("FloatStorage", array.size, array.shape, strides)
    return write_pt(file, ops, array.astype("<f4").tobytes())


VALUES = np.arange(12, dtype=np.float32).reshape(3, 4) - 5


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
    ],
)
def test_every_dtype_is_read(tmp_path, storage, dtype):
    array = VALUES.astype(dtype)
    file = write_pt(tmp_path / "a.pt", tensor_ops(storage, 12, (3, 4), (4, 1)), array.tobytes())
    result = read_tensor(file)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, array)


def test_views_are_cut_out_of_their_storage(tmp_path):
    file = write_pt(tmp_path / "a.pt", tensor_ops("FloatStorage", 12, (4, 2), (1, 4), 4), VALUES.tobytes())
    result = read_tensor(file)
    np.testing.assert_array_equal(result, VALUES[1:].T)
    assert result.flags.c_contiguous and result.flags.writeable


def test_scalars_empty_tensors_parameters_and_files_without_a_byte_order(tmp_path):
    scalar = tensor_ops("FloatStorage", 12, (), (), 3)
    assert read_tensor(write_pt(tmp_path / "s.pt", scalar, VALUES.tobytes(), None)) == VALUES.flat[3]
    assert read_tensor(write_pt(tmp_path / "e.pt", tensor_ops("HalfStorage", 0, (0, 3), (3, 1)))).shape == (
        0,
        3,
    )
    tensor = tensor_ops("FloatStorage", 12, (12,), (1,))
    parameter = op_global("torch._utils _rebuild_parameter") + b"(" + tensor + b"\x88"
    parameter += op_global("collections OrderedDict") + b")RtR"
    result = read_tensor(write_pt(tmp_path / "p.pt", parameter, VALUES.tobytes()))
    np.testing.assert_array_equal(result, VALUES.ravel())


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, protocol):
    proof = tmp_path / "proof"
    payload = pickle.dumps(Malicious(proof), protocol)
    pickle.loads(payload)
    assert proof.is_dir()  # the payload works, so the check below means something
    proof.rmdir()

    operations = payload[2:-1]  # without the protocol's number and the final stop
    alone = write_pt(tmp_path / "alone.pt", operations)
    hidden = tensor_ops("FloatStorage", 12, (12,), (1,), hooks=operations)
    inside = write_pt(tmp_path / "inside.pt", hidden, VALUES.tobytes())
    for file in (alone, inside):
        with pytest.raises(UserError, match=rf"{os.mkdir.__module__}\.mkdir.*code.*not loaded"):
            read_tensor(file)
    assert not proof.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "__builtin__ eval",
        "torch load",
        "torch._utils _rebuild_tensor_v3",
        "torch.storage _load_from_bytes",
    ],
)
def test_every_other_global_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=name.replace(" ", r"\.")):
        read_tensor(write_pt(tmp_path / "a.pt", op_global(name)))


def test_dotted_names_do_not_lead_past_the_allowed_ones(tmp_path):
    ops = op_text("collections") + op_text("OrderedDict.fromkeys") + b"\x93"
    with pytest.raises(UserError, match=r"OrderedDict\.fromkeys"):
        read_tensor(write_pt(tmp_path / "a.pt", ops))


def test_a_pickle_cannot_change_what_is_loaded_after_it(tmp_path):
    # BUILD would set attributes on the function that stands for torch's; the next file must not see them.
    from tsdsr_jax.weights import torch_pickle

    before = dict(vars(torch_pickle._rebuild_tensor))
    ops = op_global(REBUILD) + b"}" + op_text("poison") + b"K\x01sb"
    with pytest.raises(UserError, match="one tensor"):
        read_tensor(write_pt(tmp_path / "a.pt", ops))
    assert vars(torch_pickle._rebuild_tensor) == before


@pytest.mark.parametrize(
    ("ops", "kind"),
    [
        (b"}" + op_text("a") + b"K\x01s", "dict"),
        (op_global("collections OrderedDict") + b")R", "dict"),
        (b"]", "list"),
    ],
)
def test_other_things_than_one_tensor_are_refused(tmp_path, ops, kind):
    with pytest.raises(UserError, match=f"a.pt holds a {kind}, expected one tensor"):
        read_tensor(write_pt(tmp_path / "a.pt", ops))


@pytest.mark.parametrize(
    ("ops", "size"),
    [
        (
            tensor_ops("FloatStorage", 12, (3, 4), (4, 1), offset=1),
            48,
        ),  # the view passes the end of its storage
        (tensor_ops("FloatStorage", 12, (3, 4), (4, 1)), 44),  # the record is shorter than the storage
        (tensor_ops("FloatStorage", 12, (3, 4), (4,)), 48),
        (tensor_ops("FloatStorage", 12, (3, -4), (4, 1)), 48),
        (tensor_ops("FloatStorage", 12, (3, 4), (4, -1), offset=11), 48),
        (tensor_ops("FloatStorage", 12, (2**30, 2**30), (0, 0)), 48),  # a few bytes that claim exabytes
        (b"(" + op_text("storage") + b"tQ", 48),
        (b"R", 48),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, ops, size):
    with pytest.raises(UserError, match=r"a\.pt"):
        read_tensor(write_pt(tmp_path / "a.pt", ops, VALUES.tobytes()[:size]))


def test_files_that_are_not_a_torch_archive_say_what_they_are(tmp_path):
    def message(content: bytes) -> str:
        file = tmp_path / "a.pt"
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_tensor(file)
        return str(error.value)

    good = write_array(tmp_path / "good.pt", VALUES).read_bytes()
    assert "empty" in message(b"")
    assert "damaged or cut short" in message(good[: len(good) // 2])
    assert "damaged or cut short" in message(good.replace(VALUES.tobytes(), bytes(48)))
    assert "not a file of torch.save" in message(b"hello")
    assert "Git LFS pointer" in message(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Save it again" in message(bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03.")
    other = io.BytesIO()
    np.savez(other, a=VALUES)
    assert "not one of torch.save" in message(other.getvalue())
    with pytest.raises(UserError, match=r"missing\.pt cannot be read"):
        read_tensor(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="big-endian"):
        read_tensor(
            write_pt(tmp_path / "b.pt", tensor_ops("FloatStorage", 12, (12,), (1,)), bytes(48), b"big")
        )


@pytest.mark.parametrize("dtype", STORAGE_DTYPES.values(), ids=str)
def test_what_is_written_is_read_by_us_and_by_torch(tmp_path, dtype):
    for shape in ((3, 4), (), (0, 3), (2, 70_000)):  # sizes of one, two and three bytes in the pickle
        array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 120).astype(dtype)
        array = array.T  # not contiguous
        write_tensor(tmp_path / "a.pt", array)
        np.testing.assert_array_equal(read_tensor(tmp_path / "a.pt"), array, strict=True)
        if "torch" in sys.modules or sys.version_info < (3, 12):
            torch = pytest.importorskip("torch")
            tensor = torch.load(tmp_path / "a.pt", weights_only=True)
            assert str(tensor.dtype) == f"torch.{dtype.name}" and tensor.is_contiguous()
            np.testing.assert_array_equal(tensor.double().numpy(), array.astype(np.float64))


def test_writing_what_torch_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a tensor cannot have dtype complex64"):
        write_tensor(tmp_path / "a.pt", np.zeros(2, np.complex64))
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_tensor(tmp_path / "folder.pt", VALUES)


def test_torch_and_this_reader_agree(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5) / 7
    tensors = {
        "contiguous": base,
        "transposed slice": base.transpose(0, 2)[1:, ::2],
        "offset": base[1, 2:],
        "expanded": base[:, :1].expand(3, 6, 5),
        "parameter": torch.nn.Parameter(base[1]),
        "requires grad": base.clone().requires_grad_(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        **{
            str(dtype): base.to(dtype)
            for dtype in (torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
        },
    }
    for name, tensor in tensors.items():
        torch.save(tensor, tmp_path / "a.pt")
        result = read_tensor(tmp_path / "a.pt")
        np.testing.assert_array_equal(result, tensor.detach().numpy(), err_msg=name, strict=True)
    torch.save(base.bfloat16(), tmp_path / "a.pt")
    result = read_tensor(tmp_path / "a.pt")
    assert result.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result.astype(np.float32), base.bfloat16().float().numpy())

    # The archives made by hand above are torch's own format.
    loaded = torch.load(write_array(tmp_path / "hand.pt", VALUES), weights_only=True)
    np.testing.assert_array_equal(loaded.numpy(), VALUES)

    torch.save(base, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"torch before 1\.6"):
        read_tensor(tmp_path / "old.pt")
    torch.save({"a": base}, tmp_path / "dict.pt")
    with pytest.raises(UserError, match="holds a dict"):
        read_tensor(tmp_path / "dict.pt")


# --- embeddings on disk ---


def make_embeds(dtype=np.float32, seed: int = 0) -> PromptEmbeds:
    rng = np.random.default_rng(seed)
    return PromptEmbeds(rng.normal(size=(7, 12)).astype(dtype), rng.normal(size=5).astype(dtype))


def assert_same(a: PromptEmbeds, b: PromptEmbeds) -> None:
    for x, y in ((a.prompt, b.prompt), (a.pooled, b.pooled)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def write_torch_folder(folder: Path, embeds: PromptEmbeds, batch: bool = True) -> Path:
    for name, array in (("prompt_embeds.pt", embeds.prompt), ("pool_embeds.pt", embeds.pooled)):
        write_array(folder / name, array[None] if batch else array)
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_saved_embeddings_come_back_in_their_dtype(tmp_path, dtype):
    embeds = make_embeds(dtype)
    # Views with odd strides must not be written in the order of their memory.
    strided = PromptEmbeds(np.asfortranarray(embeds.prompt), np.repeat(embeds.pooled, 2)[::2])
    file = save_prompt_embeds(tmp_path / "new" / "folder", strided, {"text": "ein Wort", "encoder": "tiny"})
    assert file == tmp_path / "new" / "folder" / "prompt.safetensors"
    assert_same(load_prompt_embeds(file.parent), embeds)
    assert_same(load_prompt_embeds(file), embeds)
    with safe_open(file, framework="np") as tensors:
        assert tensors.metadata() == {"text": "ein Wort", "encoder": "tiny"}
    assert save_prompt_embeds(tmp_path / "a.b.safetensors", embeds) == tmp_path / "a.b.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.safetensors", "new"]


@pytest.mark.parametrize("batch", [True, False])
def test_the_released_layout_is_read_with_and_without_its_leading_axis(tmp_path, batch):
    embeds = make_embeds()
    assert_same(load_prompt_embeds(write_torch_folder(tmp_path, embeds, batch)), embeds)


def test_our_layout_wins_over_the_released_one(tmp_path):
    write_torch_folder(tmp_path, make_embeds(seed=1))
    save_prompt_embeds(tmp_path, make_embeds(seed=2))
    assert_same(load_prompt_embeds(tmp_path), make_embeds(seed=2))


def test_missing_folders_and_files_name_both_layouts_and_the_way_to_make_them(tmp_path):
    everything = r"prompt\.safetensors.*prompt_embeds\.pt and pool_embeds\.pt.*convert/prompts\.py"
    with pytest.raises(UserError, match=rf"nowhere: no such folder.*{everything}"):
        load_prompt_embeds(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"lacks prompt_embeds\.pt and pool_embeds\.pt\..*{everything}"):
        load_prompt_embeds(tmp_path)
    write_array(tmp_path / "prompt_embeds.pt", VALUES)
    with pytest.raises(UserError, match=r"lacks pool_embeds\.pt\."):
        load_prompt_embeds(tmp_path)
    save_file({"prompt_embeds": VALUES}, tmp_path / "prompt.safetensors")
    with pytest.raises(UserError, match="lacks the tensor pooled_embeds"):
        load_prompt_embeds(tmp_path)
    (tmp_path / "prompt.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"prompt\.safetensors: not a readable safetensors"):
        load_prompt_embeds(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "pooled", "file", "complaint"),
    [
        (
            np.zeros((2, 7, 12), np.float32),
            np.zeros(5, np.float32),
            "prompt_embeds.pt",
            r"shape \(2, 7, 12\)",
        ),
        (np.zeros(12, np.float32), np.zeros(5, np.float32), "prompt_embeds.pt", r"shape \(12,\)"),
        (np.zeros((7, 12), np.float32), np.zeros((2, 5), np.float32), "pool_embeds.pt", r"shape \(2, 5\)"),
        (
            np.full((7, 12), np.nan, np.float32),
            np.zeros(5, np.float32),
            "prompt_embeds.pt",
            "84 of 84 values",
        ),
        (np.zeros((7, 12), np.float32), np.array([1, np.inf], np.float32), "pool_embeds.pt", "1 of 2 values"),
    ],
)
def test_wrong_ranks_and_values_that_are_not_finite_are_refused(tmp_path, prompt, pooled, file, complaint):
    write_torch_folder(tmp_path, PromptEmbeds(prompt, pooled), batch=False)
    with pytest.raises(UserError, match=rf"{file}: .*{complaint}"):
        load_prompt_embeds(tmp_path)
    with pytest.raises(UserError, match=complaint):
        save_prompt_embeds(tmp_path, PromptEmbeds(prompt, pooled))


def test_integers_are_no_embedding_and_bfloat16_is_checked_too(tmp_path):
    with pytest.raises(UserError, match="int32"):
        save_prompt_embeds(tmp_path, PromptEmbeds(np.zeros((7, 12), np.int32), np.zeros(5, np.float32)))
    bad = np.array([1, np.nan], ml_dtypes.bfloat16)
    with pytest.raises(UserError, match="1 of 2 values"):
        save_prompt_embeds(tmp_path, PromptEmbeds(make_embeds(ml_dtypes.bfloat16).prompt, bad))


def test_widths_are_checked_against_the_transformer():
    check_widths(make_embeds(), 12, 5)
    for joint_dim, pooled_dim in ((13, 5), (12, 6)):
        with pytest.raises(UserError, match=rf"^here: .*12.*5.*{joint_dim}.*{pooled_dim}"):
            check_widths(make_embeds(), joint_dim, pooled_dim, Path("here"))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = save_prompt_embeds(tmp_path, make_embeds(seed=1))

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(prompt_files.os, "replace", fail)
        with pytest.raises(UserError, match="disk full"):
            save_prompt_embeds(tmp_path, make_embeds(seed=2))
    assert_same(load_prompt_embeds(tmp_path), make_embeds(seed=1))
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(UserError, match="cannot be written"):
        save_prompt_embeds(file / "below_a_file", make_embeds())


def test_the_default_prompt_is_the_released_one_to_the_letter():
    digest = "5877002207b2a66e1e3cb24d37ff8c95dab40f96e8106e56cf7a31d071f0852c"
    assert hashlib.sha256(prompt_files.DEFAULT_PROMPT.encode()).hexdigest() == digest


def test_nothing_here_imports_torch_or_jax():
    code = (
        "import sys, tsdsr_jax.weights.prompt_files, tsdsr_jax.weights.torch_pickle, tsdsr_jax.weights.text_encoders;"
        "print([name for name in ('torch', 'transformers', 'jax', 'huggingface_hub') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- convert/prompts.py ---


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "convert" / "prompts.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_script_converts_a_folder_once_and_again_only_when_told(tmp_path):
    write_torch_folder(tmp_path, make_embeds(seed=1))
    arguments = ["--input", tmp_path, "--output", tmp_path / "out"]
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    assert "prompt.safetensors: prompt (7, 12), pooled (5,), float32" in done.stdout
    assert_same(load_prompt_embeds(tmp_path / "out"), make_embeds(seed=1))

    write_torch_folder(tmp_path, make_embeds(seed=2))
    refused = run_script(*arguments)
    assert refused.returncode == 1 and "--overwrite" in refused.stderr and "Traceback" not in refused.stderr
    assert_same(load_prompt_embeds(tmp_path / "out"), make_embeds(seed=1))
    assert run_script(*arguments, "--overwrite").returncode == 0
    assert_same(load_prompt_embeds(tmp_path / "out"), make_embeds(seed=2))


def test_training_folders_are_converted_pair_by_pair(tmp_path, capsys):
    for index, stem in enumerate(["b", "a.1"]):
        embeds = make_embeds(seed=index)
        write_array(tmp_path / "prompt_embeds" / f"{stem}.pt", embeds.prompt[None])
        write_array(tmp_path / "pool_embeds" / f"{stem}.pt", embeds.pooled[None])
    script.make_embeddings(script.Options(input=tmp_path, output=tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.1.safetensors", "b.safetensors"]
    assert_same(load_prompt_embeds(tmp_path / "out" / "a.1.safetensors"), make_embeds(seed=1))
    assert capsys.readouterr().out.count("prompt (7, 12), pooled (5,)") == 2


def test_unpaired_training_files_are_named_before_anything_is_written(tmp_path):
    write_array(tmp_path / "prompt_embeds" / "both.pt", VALUES)
    write_array(tmp_path / "pool_embeds" / "both.pt", VALUES[0])
    write_array(tmp_path / "prompt_embeds" / "only_prompt.pt", VALUES)
    write_array(tmp_path / "pool_embeds" / "only_pool.pt", VALUES[0])
    with pytest.raises(UserError, match=r"only_pool\.pt, .*only_prompt\.pt") as error:
        prompt_files.convert_torch_embeds(tmp_path, tmp_path / "out")
    assert "both.pt" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_conversion_reads_the_pt_files_even_beside_a_safetensors_file(tmp_path):
    write_torch_folder(tmp_path, make_embeds(seed=1))
    save_prompt_embeds(tmp_path, make_embeds(seed=2))
    prompt_files.convert_torch_embeds(tmp_path, tmp_path, overwrite=True)
    assert_same(load_prompt_embeds(tmp_path), make_embeds(seed=1))


def test_the_script_wants_exactly_one_mode_and_a_model(tmp_path):
    for options in ({}, {"default": True, "prompt": "a"}, {"input": tmp_path, "null": True}):
        with pytest.raises(UserError, match="exactly one of"):
            script.make_embeddings(script.Options(output=tmp_path / "out", **options))
    with pytest.raises(UserError, match="--pretrained_model_name_or_path is needed"):
        script.make_embeddings(script.Options(output=tmp_path / "out", null=True))
    with pytest.raises(UserError, match=r"holds no \.txt"):
        script.make_embeddings(script.Options(output=tmp_path / "out", prompt_file=tmp_path))
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt cannot be read as UTF-8"):
        script.make_embeddings(script.Options(output=tmp_path / "out", prompt_file=tmp_path))


def test_what_each_mode_encodes_and_where_it_goes(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text(" two words\n")
    (tmp_path / "texts" / "a.txt").write_text("")
    (tmp_path / "texts" / "notes.md").write_text("no")
    out = tmp_path / "out"

    def jobs(**options) -> dict[str, str]:
        found = script.texts_to_encode(script.Options(output=out, **options))
        return {str(file.relative_to(out)): text for file, text in found.items()}

    default = prompt_files.DEFAULT_PROMPT
    assert jobs(default=True) == {"prompt.safetensors": default}
    assert jobs(null=True) == {"prompt.safetensors": ""}
    both = {"default/prompt.safetensors": default, "null/prompt.safetensors": ""}
    assert jobs(default=True, null=True) == both
    assert jobs(prompt="a cat") == {"prompt.safetensors": "a cat"}
    assert jobs(prompt_file=tmp_path / "texts" / "b.txt") == {"prompt.safetensors": "two words"}
    assert jobs(prompt_file=tmp_path / "texts") == {"a.safetensors": "", "b.safetensors": "two words"}


# --- finding the encoders ---


def make_stub_folder(folder: Path) -> Path:
    """The names that an SD3 folder has, without content."""
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        (folder / name).mkdir(parents=True)
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3" / "spiece.model").touch()
    return folder


def test_missing_subfolders_and_tokenizer_files_are_all_named(tmp_path):
    folder = make_stub_folder(tmp_path / "sd3")
    text_encoders.check_folder(folder, use_t5=True)
    (folder / "text_encoder_2").rmdir()
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UserError) as error:
        text_encoders.check_folder(folder, use_t5=True)
    assert "lacks text_encoder_2, tokenizer/(tokenizer.json or vocab.json + merges.txt)" in str(error.value)
    assert "--no_t5" not in str(error.value)
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        encode_prompts(tmp_path / "elsewhere", ["a"])


def test_only_t5_missing_points_to_no_t5(tmp_path):
    folder = make_stub_folder(tmp_path / "sd3")
    (folder / "text_encoder_3").rmdir()
    with pytest.raises(UserError, match=r"lacks text_encoder_3:.*--no_t5"):
        encode_prompts(folder, ["a"])
    text_encoders.check_folder(folder, use_t5=False)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_torch_or_transformers_the_extra_is_named(tmp_path, monkeypatch, package):
    if package == "transformers":
        pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'tsdsr_jax\[convert\]'"):
        encode_prompts(make_stub_folder(tmp_path / "sd3"), ["a"])


@pytest.mark.parametrize(
    ("files", "wanted", "result"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, None),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "fp16"),
        (["model.fp16.safetensors"], None, "fp16"),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"], None, "fp16"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "config.json"], None, None),
        (["model.safetensors"], "fp16", "available: only the plain ones"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], None, "available: bf16, fp16"),
        (["pytorch_model.bin"], None, "holds no model.safetensors"),
    ],
)
def test_the_variant_follows_the_files(tmp_path, files, wanted, result):
    for name in files:
        (tmp_path / name).touch()
    if result is None or " " not in result:
        assert text_encoders._find_variant(tmp_path, wanted) == result
    else:
        with pytest.raises(UserError, match=result):
            text_encoders._find_variant(tmp_path, wanted)


REPOSITORY_FILES = [
    "model_index.json",
    "sd3_medium.safetensors",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "tokenizer/vocab.json",
    "tokenizer_3/spiece.model",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_3/config.json",
    "text_encoder_3/model.safetensors.index.json",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
]


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("use_t5", [True, False])
def test_only_the_encoders_are_downloaded_and_one_set_of_weights(monkeypatch, variant, use_t5):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(repository, **arguments):
        asked.update(arguments, repository=repository)
        return "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find_encoders("someone/sd3", "main", variant, use_t5) == Path("cache")
    assert (asked["repository"], asked["revision"]) == ("someone/sd3", "main")
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    downloaded = list(filter_repo_objects(REPOSITORY_FILES, **patterns))
    tag = ".fp16" if variant else ""
    expected = [
        "model_index.json",
        "transformer/config.json",
        "tokenizer/vocab.json",
        "text_encoder/config.json",
    ]
    expected += [f"text_encoder/model{tag}.safetensors"]
    if use_t5:
        expected += ["tokenizer_3/spiece.model", "text_encoder_3/config.json"]
        expected += [
            "text_encoder_3/model.safetensors.index.json",
            "text_encoder_3/model.safetensors.index.fp16.json",
        ]
        expected += [f"text_encoder_3/model{tag}-00001-of-00002.safetensors"]
    assert sorted(downloaded) == sorted(expected)


def test_downloads_that_fail_say_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import errors

    def message(error: Exception) -> str:
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError) as caught:
            find_encoders("someone/sd3", "v9")
        assert "someone/sd3@v9" in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    def hub_error(kind: type) -> Exception:
        error = kind.__new__(kind)  # their constructors want an HTTP response, whose class varies
        Exception.__init__(error, "refused\nin two lines")
        return error

    assert "accept its license" in message(hub_error(errors.GatedRepoError))
    assert "--revision" in message(hub_error(errors.RevisionNotFoundError))
    assert "no such repository" in message(hub_error(errors.RepositoryNotFoundError))
    assert "cannot be downloaded" in message(errors.LocalEntryNotFoundError("no network"))
    assert "cannot be downloaded" in message(ConnectionError("no route"))
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        find_encoders(str(tmp_path / "no" / "folder"))


@pytest.mark.parametrize(
    "wrong", [{"max_sequence_length": 0}, {"max_sequence_length": 513}, {"batch_size": 0}, {"dtype": "int8"}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} "):
        EncoderOptions(**wrong)


def test_states_are_laid_out_as_the_transformer_reads_them():
    clip_l, clip_g, t5 = np.full((1, 2, 2), 1.0), np.full((1, 2, 3), 2.0), np.full((1, 1, 6), 3.0)
    result = text_encoders.join_states(clip_l, clip_g, t5)
    np.testing.assert_array_equal(result[0], [[1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 0], [3] * 6])
    with pytest.raises(UserError, match="together are 5 wide, text_encoder_3 only 4"):
        text_encoders.join_states(clip_l, clip_g, t5[..., :4])


# --- the encoders themselves, tiny and random, against diffusers ---

TEXTS = [
    "a photo of a cat",
    "",
    "Sharp, DETAILED  houses; 32k!",
    prompt_files.DEFAULT_PROMPT,
    "é 漢 <|endoftext|> x",
]


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    save_text_encoders(folder)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps({"joint_attention_dim": 32}))
    return folder


def diffusers_result(
    folder: Path, texts: list[str], length: int, dtype: str = "float32", use_t5: bool = True
):
    """What StableDiffusion3Pipeline.encode_prompt makes of the texts: float32 arrays (N, S, D) and (N, P)."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")

    def load(kind: str, name: str):
        return getattr(transformers, kind).from_pretrained(folder / name, dtype=getattr(torch, dtype)).eval()

    def tokenizer(kind: str, name: str):
        return getattr(transformers, kind).from_pretrained(folder / name)

    transformer = diffusers.SD3Transformer2DModel(
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=8,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=None,
        vae=None,
        text_encoder=load("CLIPTextModelWithProjection", "text_encoder"),
        tokenizer=tokenizer("CLIPTokenizer", "tokenizer"),
        text_encoder_2=load("CLIPTextModelWithProjection", "text_encoder_2"),
        tokenizer_2=tokenizer("CLIPTokenizer", "tokenizer_2"),
        text_encoder_3=load("T5EncoderModel", "text_encoder_3") if use_t5 else None,
        tokenizer_3=tokenizer("T5TokenizerFast", "tokenizer_3") if use_t5 else None,
    )
    with torch.no_grad():
        prompt, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
        )
    return prompt.float().numpy(), pooled.float().numpy()


def stacked(embeds: list[PromptEmbeds]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(e.prompt.astype(np.float32), e.pooled.astype(np.float32)) for e in embeds]
    return tuple(np.stack(arrays) for arrays in zip(*pairs, strict=True))


def assert_close(ours, theirs, bound: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= bound * np.abs(b).max()


@pytest.mark.filterwarnings("ignore:a prompt has:UserWarning")
@pytest.mark.parametrize("batch_size", [2, 8])
def test_texts_are_encoded_as_in_diffusers(sd3_folder, batch_size):
    ours = encode_prompts(sd3_folder, TEXTS, EncoderOptions(dtype="fp32", batch_size=batch_size))
    assert ours[0].prompt.shape == (77 + 256, 32) and ours[0].pooled.shape == (16,)
    assert ours[0].prompt.dtype == np.float32
    theirs = diffusers_result(sd3_folder, TEXTS, 256)
    assert_close(stacked(ours), theirs, 1e-5)
    # The comparison is worth something: texts differ, also where only T5 or only a CLIP encoder looks.
    for part in (np.s_[:77, :8], np.s_[:77, 8:20], np.s_[77:, :]):
        first, second = ours[0].prompt[part], ours[1].prompt[part]
        assert np.abs(first - second).max() > 1e-2 * np.abs(first).max()


@pytest.mark.filterwarnings("ignore:a prompt has:UserWarning")
def test_another_length_and_no_t5_agree_with_diffusers_too(sd3_folder):
    ours = encode_prompts(sd3_folder, TEXTS, EncoderOptions(dtype="fp32", max_sequence_length=12))
    assert_close(stacked(ours), diffusers_result(sd3_folder, TEXTS, 12), 1e-5)
    ours = encode_prompts(sd3_folder, TEXTS, EncoderOptions(dtype="fp32", use_t5=False))
    assert_close(stacked(ours), diffusers_result(sd3_folder, TEXTS, 256, use_t5=False), 1e-5)
    assert not ours[0].prompt[77:].any() and ours[0].prompt[:77].any()


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_low_precision_is_stored_as_such_and_agrees(sd3_folder, dtype, torch_dtype):
    texts = TEXTS[:2]
    ours = encode_prompts(sd3_folder, texts, EncoderOptions(dtype=dtype))
    for array in (ours[0].prompt, ours[0].pooled):
        assert array.dtype == (np.float16 if dtype == "fp16" else ml_dtypes.bfloat16)
    assert_close(stacked(ours), diffusers_result(sd3_folder, texts, 256, torch_dtype), 1e-3)
    zeros = encode_prompts(sd3_folder, texts, EncoderOptions(dtype=dtype, use_t5=False))[0]
    assert zeros.prompt.dtype == ours[0].prompt.dtype and zeros.prompt.shape == ours[0].prompt.shape


def test_a_cut_text_is_quoted_in_a_warning(sd3_folder):
    text = "cat " * 75 + "the photo"
    with pytest.warns(UserWarning) as caught:
        encode_prompts(sd3_folder, ["cat", text], EncoderOptions(dtype="fp32", max_sequence_length=64))
    messages = [str(warning.message) for warning in caught if "a prompt has" in str(warning.message)]
    assert len(messages) == 2  # one from CLIP, though it is two encoders, and one from T5
    assert "79 CLIP tokens" in messages[0] and messages[0].endswith(": 'the photo'")
    assert "T5 takes 64" in messages[1] and messages[1].endswith("the photo'")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        encode_prompts(sd3_folder, ["cat " * 75], EncoderOptions(dtype="fp32"))  # 77 tokens just fit


def test_encoders_take_turns_in_memory(sd3_folder, monkeypatch):
    loaded = []
    load = text_encoders._load_encoder

    def spy(*arguments):
        assert all(p.is_meta for encoder in loaded for p in encoder.parameters())
        loaded.append(load(*arguments))
        assert not any(p.is_meta for p in loaded[-1].parameters())
        return loaded[-1]

    monkeypatch.setattr(text_encoders, "_load_encoder", spy)
    encode_prompts(sd3_folder, ["a"], EncoderOptions(dtype="fp32"))
    assert [type(encoder).__name__ for encoder in loaded] == ["CLIPTextModelWithProjection"] * 2 + [
        "T5EncoderModel"
    ]
    assert all(p.is_meta for encoder in loaded for p in encoder.parameters())


def copied(folder: Path, target: Path, *, without: str | None = None) -> Path:
    """A copy of the folder made of links, in which one subfolder can be replaced."""
    target.mkdir()
    for entry in folder.iterdir():
        if entry.name != without:
            (target / entry.name).symlink_to(entry)
    return target


def test_a_pipeline_saved_without_t5_needs_no_flag(sd3_folder, tmp_path):
    folder = copied(sd3_folder, tmp_path / "sd3", without="text_encoder_3")
    (folder / "model_index.json").write_text(json.dumps({"text_encoder_3": [None, None]}))
    with pytest.warns(UserWarning, match="saved without T5"):
        ours = encode_prompts(folder, ["a"], EncoderOptions(dtype="fp32"))[0]
    assert ours.prompt.shape == (333, 32) and not ours.prompt[77:].any()
    (folder / "transformer").unlink()
    with pytest.raises(UserError, match=r"transformer/config\.json is missing"):
        encode_prompts(folder, ["a"], EncoderOptions(use_t5=False))


def test_encoders_that_lack_tensors_or_know_fewer_tokens_are_refused(sd3_folder, tmp_path):
    from safetensors.numpy import load_file

    folder = copied(sd3_folder, tmp_path / "sd3", without="text_encoder")
    encoder = folder / "text_encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text((sd3_folder / "text_encoder" / "config.json").read_text())
    tensors = load_file(sd3_folder / "text_encoder" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "projection" not in k}, encoder / "model.safetensors")
    with pytest.raises(
        UserError, match="lacks 1 tensors of CLIPTextModelWithProjection, such as text_projection"
    ):
        encode_prompts(folder, ["a"], EncoderOptions(dtype="fp32"))

    (encoder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="text_encoder cannot be loaded"):
        encode_prompts(folder, ["a"], EncoderOptions(dtype="fp32"))

    for file in encoder.iterdir():
        file.unlink()
    save_clip(encoder, vocab_size=100, width=8, projection=6)
    with pytest.raises(UserError, match="text_encoder has only 100"):
        encode_prompts(folder, ["a"], EncoderOptions(dtype="fp32"))


def test_a_device_that_is_not_there_is_a_user_error(sd3_folder):
    with pytest.raises(UserError, match="--device nonsense"):
        encode_prompts(sd3_folder, ["a"], EncoderOptions(device="nonsense"))


def test_no_texts_give_no_embeddings(sd3_folder):
    assert encode_prompts(sd3_folder, []) == []


def test_the_script_encodes_default_and_null(sd3_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "TEXTS_PER_LOAD", 1)
    arguments = {"default": True, "null": True, "dtype": "fp32", "output": tmp_path}
    options = script.Options(pretrained_model_name_or_path=str(sd3_folder), **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script.make_embeddings(options)
        prompt, pooled = diffusers_result(sd3_folder, [prompt_files.DEFAULT_PROMPT, ""], 256)
    assert capsys.readouterr().out.count("prompt (333, 32), pooled (16,), float32") == 2
    written = [load_prompt_embeds(tmp_path / name) for name in ("default", "null")]
    assert_close(stacked(written), (prompt, pooled), 1e-5)
    with safe_open(tmp_path / "default" / "prompt.safetensors", framework="np") as tensors:
        assert tensors.metadata() == {"text": prompt_files.DEFAULT_PROMPT, "encoder": f"{sd3_folder} fp32"}
    with pytest.raises(
        UserError, match=r"default/prompt\.safetensors.*null/prompt\.safetensors.*--overwrite"
    ):
        script.make_embeddings(options)
