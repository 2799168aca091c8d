"""Tensor names in LoRA files of PEFT, diffusers and others; names with an unclear meaning are refused.

A module's pair is `MODULE.lora_A.weight` and `.lora_B.weight` (PEFT may insert its adapter's name, `default`), or
`.lora_down.weight` and `.lora_up.weight`. `MODULE.alpha` may accompany it. Names may begin with `base_model.model.`,
`transformer.` or both, in this order.

kohya's names (`lora_unet_MODULE`, `lora_transformer_MODULE`) have underscores for dots. They are read where they name
modules of diffusers' network, and refused where they name Stability's, whose queries, keys and values are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from tsdsr_jax.errors import UserError, listed

PEFT_PREFIX = "base_model.model."
_PREFIXES = r"(?P<peft>base_model\.model\.)?(?P<inner>transformer\.)?"
_NAME = re.compile(
    _PREFIXES + r"(?P<module>.+)\.(lora_(?P<half>A|B|down|up)(\.default)?\.weight|(?P<alpha>alpha))"
)
_HALVES = {"A": "A", "B": "B", "down": "A", "up": "B"}
_KOHYA = re.compile(r"lora_(?:unet|transformer)_(?P<module>[^.]+)(?P<rest>\..+)")
_AUTOENCODER = re.compile(_PREFIXES + r"(encoder|decoder)[./]")

# How to recognize other kinds of files, and what messages say about them.
_OTHERS = (
    (
        r"lora_(unet|transformer)_.*",
        "is a LoRA with kohya's names, some of which are no modules of this network",
    ),
    (r"(text_encoder|lora_te|te\d).*", "adapts text encoders, too"),
    (r".*(lora_magnitude_vector|dora_scale).*", "is a DoRA, which is more than a product A·B"),
    (r".*\.lora_B(\.\w+)?\.bias", "is a LoRA with biases (lora_bias)"),
    (r".*\.lokr_.*", "is a LoKr"),
    (r".*\.(hada_|loha_).*", "is a LoHa"),
    (r"diffusion_model\..*|model\.diffusion_model\..*", "is a LoRA with ComfyUI's names"),
    (r".*(\.lora|_lora|lora_linear_layer)\.(down|up)\.weight", "is a LoRA with diffusers' older names"),
)


class Names(NamedTuple):
    """The meaning of a file's names.

    Attributes:
      tensors: `proj_out.lora_A.weight` -> the name in the file.
      alphas: `proj_out` -> the name of its alpha in the file.
      keys: `proj_out` -> the name that PEFT's patterns must match.
    """

    tensors: dict[str, str]
    alphas: dict[str, str]
    keys: dict[str, str]


def part_of(names: Iterable[str]) -> Literal["transformer", "vae"]:
    """The network that a LoRA file belongs to, judging by its module names, in PEFT's layout or ours."""
    return "vae" if any(_AUTOENCODER.match(name) for name in names) else "transformer"


def understand(names: Iterable[str], source: object, modules: Iterable[str] = ()) -> Names:
    """Finds out what each name means.

    Args:
      names: of a file's tensors.
      source: the file, for messages.
      modules: names of the network's modules in torch.

    Raises:
      UserError: a name is not that of a LoRA's tensor, or two names mean the same tensor.
    """
    dotted = _with_dots(names, modules)
    _refuse_others(list(dotted.values()), source)
    found = Names({}, {}, {})
    for name, read_as in dotted.items():
        match = _NAME.fullmatch(read_as)
        assert match is not None  # `_refuse_others` has refused those
        module, half = match["module"], match["half"]
        group, plain = (
            (found.tensors, f"{module}.lora_{_HALVES[half]}.weight") if half else (found.alphas, module)
        )
        if plain in group:
            raise UserError(f"{source}: {group[plain]} and {name} mean the same; keep one of them")
        group[plain] = name
        # PEFT's patterns see names relative to the model that it wraps; without PEFT's prefix "transformer." is diffusers'.
        found.keys[module] = "transformer." + module if match["peft"] and match["inner"] else module
    return found


def _with_dots(names: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Name in the file -> the same with dots, if kohya's underscores stand for those of exactly one module."""
    meanings: dict[str, list[str]] = {}
    for module in modules:
        meanings.setdefault(module.replace(".", "_"), []).append(module)

    def read(name: str) -> str:
        match = _KOHYA.fullmatch(name)
        found = meanings.get(match["module"], []) if match else []
        return found[0] + match["rest"] if match and len(found) == 1 else name

    return {name: read(name) for name in names}


def _refuse_others(names: list[str], source: object) -> None:
    expected = "expected names like transformer.<module>.lora_A.weight, found"
    for pattern, what in _OTHERS:
        if these := [name for name in names if re.fullmatch(pattern, name)]:
            raise UserError(f"{source}: {what}; {expected} {listed(these, 3)}")
    foreign = [name for name in names if not _NAME.fullmatch(name)]
    if foreign or not names:
        raise UserError(
            f"{source}: not a LoRA for this network; {expected} {listed(foreign, 3) or 'no tensors'}"
        )
