"""Converts LPIPS from torchvision's network and the lpips package's lin layers to a single file in our layout.

    python convert/lpips.py --network alex --backbone alexnet-owt-7be5be79.pth --lin alex.pth --output lpips_alex.safetensors
    python convert/lpips.py --network vgg --backbone vgg16-397923af.pth --lin vgg.pth --output lpips_vgg.safetensors

The inputs may also be safetensors files with the same tensors. Reading .pth files needs `pip install 'tsdsr_jax[convert]'`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from tsdsr_jax import cli
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.lpips_files import read_torch_lpips, save_lpips


@dataclasses.dataclass(frozen=True)
class Options:
    network: Literal["alex", "vgg"]
    """The network whose features LPIPS compares; alex is the usual one."""
    backbone: Path
    """torchvision's weights of the network, or the state dict of the lpips package's whole LPIPS module."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Safetensors file to write."""
    lin: Path | None = None
    """The lpips package's weights/v0.1/NETWORK.pth; not needed if --backbone is the whole module."""
    overwrite: bool = False
    """Replace the output file if it exists."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    target = options.output
    if target.is_dir():
        raise UserError(f"{target}: is a folder; --output must name a file, such as lpips_alex.safetensors")
    if target.resolve() in [path.resolve() for path in (options.backbone, options.lin) if path]:
        raise UserError(f"{target}: input and output are the same file; choose another --output")
    if target.exists() and not options.overwrite:
        raise UserError(f"{target}: already exists; pass --overwrite to replace it")
    params = read_torch_lpips(options.network, options.backbone, options.lin)
    save_lpips(target, options.network, params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"wrote {target}: LPIPS over {options.network}, {count / 1e6:.1f} M parameters")
