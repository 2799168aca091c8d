"""LPIPS: against PyTorch, against committed numbers, and from the files a user downloads."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from parity import error, leaves, uniform
from tsdsr_jax.errors import UserError
from tsdsr_jax.hints import interpreter
from tsdsr_jax.models.lpips import LPIPS, minimum_side, unit_length
from tsdsr_jax.models.params import Tree
from tsdsr_jax.weights import lpips_files
from tsdsr_jax.weights.lpips_files import LIN, TORCHVISION, load_lpips, read_torch_lpips, save_lpips
from tsdsr_jax.weights.tensor_files import save_tensors

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ("alex", "vgg")
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4

# Distances of `golden_images` under `random_files`, by the oracle in float64 (a test below computes them again).
GOLDEN = {"alex": (0.02263996726, 1.504921727), "vgg": (0.03132995195, 1.340726302)}


@pytest.fixture(scope="module")
def oracle() -> Iterator[Any]:
    """The module `oracle_lpips`; torch on one thread meanwhile."""
    torch = pytest.importorskip("torch")
    import oracle_lpips

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield oracle_lpips
    torch.set_num_threads(threads)


# --- weights, images and files --------------------------------------------------------------


def random_files(network: str, folder: Path) -> tuple[Path, Path]:
    """Random weights as a user's two files, in safetensors; made without torch."""
    files = []
    for layout in (TORCHVISION, LIN):
        tensors = {}
        for entry in lpips_files.entries(network, layout):
            (name,), shape = entry.names, entry.torch_shape
            noise = uniform(name, shape)
            if layout is LIN:
                tensors[name] = np.abs(noise)
            elif len(shape) == 1:
                tensors[name] = np.float32(0.1) * noise
            else:  # keeps the variance through a ReLU
                tensors[name] = noise * np.float32(math.sqrt(2 / math.prod(shape[1:])))
        files.append(folder / f"{network}_{'lin' if layout is LIN else 'backbone'}.safetensors")
        save_tensors(files[-1], tensors, {"format": "pt"})
    return files[0], files[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(backbone, lin) of each network."""
    folder = tmp_path_factory.mktemp("lpips")
    return {network: random_files(network, folder) for network in NETWORKS}


def images(*shape: int, seed: int = 0) -> np.ndarray:
    """Noise in [-1, 1]."""
    return uniform("image", shape, seed) / np.float32(3**0.5)


def golden_images() -> tuple[np.ndarray, np.ndarray]:
    """An image twice, beside one that is a little different and one that has nothing to do with it."""
    first = images(1, 40, 56, 3).repeat(2, axis=0)
    other = images(1, 40, 56, 3, seed=1)
    return first, np.concatenate([0.9 * first[:1] + 0.1 * other, other])


@partial(jax.jit, static_argnums=(0, 4))
def distance(network: str, params: Tree, first: Any, second: Any, dtype: Any = jnp.float32) -> jax.Array:
    return LPIPS(network, dtype).apply({"params": params}, first, second)


@partial(jax.jit, static_argnums=0)
def with_gradient(network: str, params: Tree, first: Any, second: Any) -> tuple[jax.Array, jax.Array]:
    """The distances, and the gradient of their sum with respect to the first image."""
    distances, pull = jax.vjp(lambda image: distance(network, params, image, second), first)
    return distances, pull(jnp.ones_like(distances))[0]


def save_torch(model: Any, folder: Path, zipped: bool = True) -> tuple[Path, Path]:
    """The two downloads of an oracle model."""
    import torch

    backbone, lin = folder / "backbone.pth", folder / "lin.pth"
    torch.save(model.backbone.state_dict(), backbone, _use_new_zipfile_serialization=zipped)
    torch.save(model.lins.state_dict(), lin, _use_new_zipfile_serialization=zipped)
    return backbone, lin


def channels_first(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.asarray(array)).permute(0, 3, 1, 2)


# --- against PyTorch ------------------------------------------------------------------------

SIZES = {"alex": ((1, 31, 31), (3, 40, 64), (1, 96, 33)), "vgg": ((1, 16, 16), (3, 33, 20))}


@pytest.mark.parametrize("network", NETWORKS)
def test_distances_and_gradients_equal_torch(oracle: Any, tmp_path: Path, network: str) -> None:
    import torch

    model = oracle.LPIPS(network, seed=1)
    params = read_torch_lpips(network, *save_torch(model, tmp_path))
    for shape in SIZES[network]:
        first, second = images(*shape, 3), images(*shape, 3, seed=1)
        theirs = channels_first(first).requires_grad_()
        expected = model(theirs, channels_first(second))
        (expected_gradient,) = torch.autograd.grad(expected.sum(), theirs)
        ours, gradient = with_gradient(network, params, first, second)
        assert ours.dtype == jnp.float32
        assert error(ours, expected.detach()) <= TOLERANCE
        assert error(gradient, expected_gradient.permute(0, 2, 3, 1)) <= GRADIENT_TOLERANCE


@pytest.mark.parametrize("network", NETWORKS)
def test_committed_numbers_are_the_oracles(oracle: Any, files: dict, network: str) -> None:
    from safetensors.torch import load_file

    model = oracle.LPIPS(network, seed=0)
    backbone, lin = (load_file(file) for file in files[network])
    model.backbone.load_state_dict(backbone | model.backbone.classifier.state_dict(prefix="classifier."))
    model.lins.load_state_dict(lin)
    with pytest.importorskip("torch").no_grad():
        first, second = (channels_first(image).double() for image in golden_images())
        expected = model.double()(first, second).numpy()
    np.testing.assert_allclose(GOLDEN[network], expected, rtol=1e-7)


@pytest.mark.parametrize("network", NETWORKS)
def test_smallest_images_are_the_same_as_in_torch(oracle: Any, network: str) -> None:
    import torch

    side = minimum_side(network)
    backbone = oracle.TorchvisionNet(network)
    assert len(backbone(torch.zeros(1, 3, side, side))) == 5
    with pytest.raises(RuntimeError, match="too small"):
        backbone(torch.zeros(1, 3, side - 1, side))


# --- without torch --------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_distances_are_the_committed_numbers(files: dict, network: str) -> None:
    params = read_torch_lpips(network, *files[network])
    ours = distance(network, params, *golden_images())
    np.testing.assert_allclose(ours, GOLDEN[network], rtol=TOLERANCE)


@pytest.mark.parametrize("network", NETWORKS)
def test_distance_is_symmetric_and_zero_between_equal_images(files: dict, network: str) -> None:
    params = read_torch_lpips(network, *files[network])
    first, second = golden_images()
    there, back = (distance(network, params, *pair) for pair in ((first, second), (second, first)))
    np.testing.assert_array_equal(there, back)
    np.testing.assert_array_equal(distance(network, params, first, first.copy()), 0)
    assert (np.asarray(there) > 0).all()


def test_each_pair_of_a_batch_counts_for_itself(files: dict) -> None:
    params = read_torch_lpips("alex", *files["alex"])
    first, second = golden_images()
    alone = [distance("alex", params, first[i : i + 1], second[i : i + 1])[0] for i in range(2)]
    np.testing.assert_allclose(distance("alex", params, first, second), alone, rtol=TOLERANCE)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_is_finite_for_equal_and_for_constant_images(files: dict, network: str) -> None:
    params = read_torch_lpips(network, *files[network])

    def constant(bias: float) -> Tree:
        change = {"kernel": lambda leaf: leaf * 0, "bias": lambda leaf: np.full_like(leaf, bias)}
        return unflatten_dict(
            {
                path: change.get(path[-1], lambda leaf: leaf)(leaf)
                for path, leaf in flatten_dict(params).items()
            }
        )

    # −1: every ReLU is off, all norms are 0. 1e-30: they are on, with values whose squares are 0 in float32.
    image = images(1, *2 * [minimum_side(network)], 3)
    for weights in (params, constant(-1), constant(1e-30)):
        for pair in ((image, image), (np.ones_like(image), image), (image * 0, image * 0)):
            for result in with_gradient(network, weights, *pair):
                assert np.isfinite(result).all()


def test_vectors_are_normalised_with_epsilon_beside_the_root() -> None:
    lengths = np.array([0, 1e-12, 1e-10, 1e-6, 1, 1e6], np.float32)
    direction = np.array([0.6, 0, 0.8], np.float32)
    x = lengths[:, None] * direction
    expected = x / (lengths[:, None] + 1e-10)
    np.testing.assert_allclose(unit_length(x), expected, rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda x: unit_length(x)[0]))(x)
    assert np.isfinite(slope).all()
    # d/dx₀ of x₀ / (n + ε) is 1 / (n + ε) − x₀² / (n (n + ε)²), and 1 / ε at 0.
    along = 1 / (lengths + 1e-10) - 0.36 * lengths / (lengths + 1e-10) ** 2
    np.testing.assert_allclose(slope[:, 0], along, rtol=1e-5)


def test_only_convolutions_use_the_lower_precision(files: dict) -> None:
    params = read_torch_lpips("alex", *files["alex"])
    first, second = golden_images()
    model = LPIPS("alex", jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda params: model.apply({"params": params}, first, second))(params)
    used = {(eqn.primitive.name, str(eqn.invars[0].aval.dtype)) for eqn in _equations(jaxpr.jaxpr)}
    assert {name for name, dtype in used if dtype == "bfloat16"} >= {"conv_general_dilated"}
    float32_only = {"reduce_sum", "sqrt", "div", "sub", "square", "integer_pow", "dot_general"}
    assert not {name for name, dtype in used if dtype == "bfloat16"} & float32_only
    ours = distance("alex", params, first, second, jnp.bfloat16)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, GOLDEN["alex"], rtol=0.02)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.mark.parametrize(("network", "smallest"), (("alex", 31), ("vgg", 16)))
def test_images_that_are_too_small_are_refused(network: str, smallest: int) -> None:
    assert minimum_side(network) == smallest
    model = LPIPS(network)
    image = np.zeros((1, smallest, smallest, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image, image)
    assert all(leaf.size for leaf in jax.tree.leaves(shapes))
    for small in (image[:, 1:], image[:, :, 1:]):
        with pytest.raises(ValueError, match=rf"at least {smallest}×{smallest} pixels"):
            jax.eval_shape(model.init, jax.random.key(0), small, small)


def test_other_shapes_and_networks_are_refused() -> None:
    image = np.zeros((2, 32, 32, 3), np.float32)
    for first, second in ((image, image[:1]), (image[0], image[0]), (image[..., :1], image[..., :1])):
        with pytest.raises(ValueError, match=r"expected \(B, H, W, 3\)"):
            LPIPS("alex").init(jax.random.key(0), first, second)
    with pytest.raises(ValueError, match="'squeeze'; expected one of alex, vgg"):
        LPIPS("squeeze").init(jax.random.key(0), image, image)


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_own_files_hold_the_parameters_and_their_network(files: dict, tmp_path: Path, network: str) -> None:
    params = read_torch_lpips(network, *files[network])
    image = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(LPIPS(network).init, jax.random.key(0), image, image)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    path = tmp_path / "weights.safetensors"
    save_lpips(path, network, params)
    loaded_network, loaded = load_lpips(path)
    assert loaded_network == network
    assert leaves(loaded).keys() == leaves(params).keys()
    for name, leaf in leaves(params).items():
        np.testing.assert_array_equal(leaves(loaded)[name], leaf)


def test_half_precision_files_become_float32(files: dict, tmp_path: Path) -> None:
    backbone, lin = files["alex"]
    half = tmp_path / "half.safetensors"
    save_tensors(half, {name: array.astype(np.float16) for name, array in read(backbone).items()})
    for leaf in jax.tree.leaves(read_torch_lpips("alex", half, lin)):
        assert leaf.dtype == np.float32


def read(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.parametrize("network", NETWORKS)
def test_state_dict_of_the_whole_package_gives_the_same(oracle: Any, tmp_path: Path, network: str) -> None:
    import torch

    model = oracle.LPIPS(network, seed=2)
    two = read_torch_lpips(network, *save_torch(model, tmp_path))
    whole = tmp_path / "lpips.pth"
    torch.save(model.package_state(), whole)
    one = read_torch_lpips(network, whole)
    assert leaves(one).keys() == leaves(two).keys()
    for name, leaf in leaves(two).items():
        np.testing.assert_array_equal(leaves(one)[name], leaf)
    with pytest.raises(UserError, match="leave out --lin"):
        read_torch_lpips(network, whole, tmp_path / "lin.pth")


def run_script(*arguments: object, path: Path = ROOT) -> subprocess.CompletedProcess:
    """`python convert/lpips.py ...`, in a process of its own; `path` goes before the installed packages."""
    command = [sys.executable, str(ROOT / "convert" / "lpips.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that hides the installed torch."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    return folder


def fails(done: subprocess.CompletedProcess, *words: str) -> None:
    """The script ended with a message for the user that has these words."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("zipped", (True, False), ids=("zip", "legacy"))
def test_the_script_converts_what_torch_saved(oracle: Any, tmp_path: Path, zipped: bool) -> None:
    model = oracle.LPIPS("alex", seed=3)
    backbone, lin = save_torch(model, tmp_path, zipped)
    assert (backbone.read_bytes()[:2] == b"PK") == zipped
    target = tmp_path / "new" / "lpips_alex.safetensors"
    arguments = ("--network", "alex", "--backbone", backbone, "--lin", lin, "--output", target)
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {target}: LPIPS over alex, 2.5 M parameters\n"
    network, params = load_lpips(target)
    first, second = golden_images()
    expected = model(channels_first(first), channels_first(second)).detach()
    assert error(distance(network, params, first, second), expected) <= TOLERANCE


def test_the_script_needs_no_torch_for_safetensors_and_overwrites_when_told(
    files: dict, tmp_path: Path, without_torch: Path
) -> None:
    backbone, lin = files["alex"]
    target = tmp_path / "lpips_alex.safetensors"
    arguments = ("--network", "alex", "--backbone", backbone, "--lin", lin, "--output", target)
    done = run_script(*arguments, path=without_torch)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        distance(*load_lpips(target), *golden_images()), GOLDEN["alex"], rtol=TOLERANCE
    )

    target.write_bytes(b"mine")
    fails(run_script(*arguments), "already exists", "--overwrite")
    assert target.read_bytes() == b"mine"
    assert run_script(*arguments, "--overwrite").returncode == 0
    assert load_lpips(target)[0] == "alex"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_the_script_names_the_mistake(files: dict, tmp_path: Path, without_torch: Path) -> None:
    backbone, lin = files["alex"]
    target = tmp_path / "out.safetensors"

    def run(backbone: Path, lin: Path, output: Path = target, network: str = "alex", **options: Path):
        names = ("--network", network, "--backbone", backbone, "--lin", lin, "--output", output)
        return run_script(*names, **options)

    pickled = tmp_path / "alexnet.pth"
    pickled.write_bytes(b"")
    fails(run(pickled, lin, path=without_torch), "needs torch", "tsdsr_jax[convert]")
    missing = tmp_path / "alexnet-owt-7be5be79.pth"
    fails(run(missing, lin), f"{missing}: not found", "https://download.pytorch.org/models/alexnet-owt")
    fails(run(backbone, lin, network="vgg"), "the weights for alex, not vgg", "--network alex")
    fails(run(backbone, lin, output=tmp_path), "is a folder")
    fails(run(backbone, lin, output=lin), "input and output are the same file")
    assert not target.exists()


@pytest.mark.parametrize("zipped", (True, False), ids=("zip", "legacy"))
def test_damaged_pickles_are_the_users_to_mend(oracle: Any, tmp_path: Path, zipped: bool) -> None:
    backbone, lin = save_torch(oracle.LPIPS("alex", seed=0), tmp_path, zipped)
    whole = lin.read_bytes()
    for size in (0, 10, 100, len(whole) // 2, len(whole) - 10):
        lin.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"lin.pth: not a readable file .* truncated"):
            read_torch_lpips("alex", backbone, lin)


def test_pickles_of_something_else_are_refused(oracle: Any, files: dict, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "other.pth"
    for content in (torch.zeros(3), {"state_dict": {"features.0.weight": torch.zeros(1)}}):
        torch.save(content, path)
        with pytest.raises(UserError, match="expected a state dict"):
            read_torch_lpips("alex", path, files["alex"][1])
    torch.save(oracle.LinLayers("alex"), path)  # a whole module: code, which is not run
    with pytest.raises(UserError, match="not a readable file"):
        read_torch_lpips("alex", path, files["alex"][1])


def test_torch_is_asked_for_when_it_is_needed(files: dict, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    read_torch_lpips("alex", *files["alex"])
    pickled = tmp_path / "alex.pth"
    pickled.touch()
    with pytest.raises(
        UserError, match=r"alex.pth: reading it needs torch: pip install 'tsdsr_jax\[convert\]'"
    ):
        read_torch_lpips("alex", files["alex"][0], pickled)


def changed(path: Path, folder: Path, change: Any) -> Path:
    """A copy of a safetensors file whose dict of tensors went through `change`."""
    tensors = read(path)
    change(tensors)
    copy = folder / f"changed_{path.name}"
    save_tensors(copy, tensors)
    return copy


def test_every_tensor_that_does_not_fit_is_named(files: dict, tmp_path: Path) -> None:
    backbone, lin = files["alex"]

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["features.3.bias"], tensors["features.10.weight"]
        tensors["features.0.weight"] = tensors["features.0.weight"][:, :1]
        tensors["features.1.weight"] = tensors["classifier.1.scale"] = np.zeros(1, np.float32)

    with pytest.raises(UserError) as caught:
        read_torch_lpips("alex", changed(backbone, tmp_path, spoil), lin)
    assert str(caught.value).split("\n") == [
        f"{tmp_path}/changed_alex_backbone.safetensors: does not fit torchvision's network for alex "
        "(2 missing, 2 unexpected, 1 wrong shape)",
        "  missing: features.3.bias",
        "  missing: features.10.weight",
        "  unexpected: classifier.1.scale",
        "  unexpected: features.1.weight",
        "  wrong shape: features.0.weight is (64, 1, 11, 11), expected (64, 3, 11, 11)",
    ]
    with pytest.raises(
        UserError, match=r"lin layers for alex \(1 missing\)\n  missing: lin2.model.1.weight$"
    ):
        read_torch_lpips("alex", backbone, changed(lin, tmp_path, lambda t: t.pop("lin2.model.1.weight")))
    with pytest.raises(
        UserError, match=r"lin layers for alex \(1 unexpected\)\n  unexpected: classifier.1.bias$"
    ):
        extra = {"classifier.1.bias": np.zeros(1, np.float32)}
        read_torch_lpips("alex", backbone, changed(lin, tmp_path, lambda t: t.update(extra)))


def test_classifiers_are_left_aside(files: dict, tmp_path: Path) -> None:
    backbone, lin = files["alex"]
    extra = {
        f"classifier.{i}.{leaf}": np.ones(2, np.float32) for i in (1, 4, 6) for leaf in ("weight", "bias")
    }
    params = read_torch_lpips("alex", changed(backbone, tmp_path, lambda t: t.update(extra)), lin)
    assert len(flatten_dict(params)) == 15


def test_files_in_each_others_place_are_told_apart(files: dict, tmp_path: Path) -> None:
    backbone, lin = files["alex"]
    with pytest.raises(UserError, match="not one tensor belongs to torchvision's network for alex"):
        read_torch_lpips("alex", lin, backbone)
    with pytest.raises(UserError, match=r"vgg_lin.safetensors: these are the weights for vgg, not alex"):
        read_torch_lpips("alex", backbone, files["vgg"][1])
    with pytest.raises(UserError, match=r"weights/v0.1/alex.pth as --lin"):
        read_torch_lpips("alex", backbone)


def test_missing_weights_come_with_the_way_to_get_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "lpips_vgg.safetensors"
    with pytest.raises(UserError) as caught:
        load_lpips(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not found") and "lpips/weights/v0.1/vgg.pth" in message
    assert message.split("\n")[-1].strip() == (
        f"{interpreter()} convert/lpips.py --network vgg --backbone vgg16-397923af.pth --lin vgg.pth --output {path}"
    )
    with pytest.raises(
        UserError, match=r"--network alex --backbone alexnet-owt-7be5be79\.pth --lin alex\.pth"
    ):
        load_lpips(tmp_path / "weights.safetensors")


def test_other_and_damaged_files_are_refused_when_loading(files: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a file that convert/lpips.py wrote"):
        load_lpips(files["alex"][0])
    path = tmp_path / "lpips.safetensors"
    params = read_torch_lpips("alex", *files["alex"])
    save_lpips(path, "alex", {name: leaf for name, leaf in params.items() if name != "lin3"})
    with pytest.raises(UserError, match=r"does not fit LPIPS over alex \(1 missing\)\n  missing: lin3$"):
        load_lpips(path)
    save_lpips(path, "alex", params)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_lpips(path)
