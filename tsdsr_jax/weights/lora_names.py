"""The names that tensors of a LoRA have in files of PEFT, diffusers and others: one meaning each, or refused.

Read are `MODULE.lora_A.weight` and `.lora_B.weight` of a module's two halves, with or without the adapter's name
`default`, or `.lora_down.weight` and `.lora_up.weight`; and `MODULE.alpha`. Before that may stand `transformer.`,
`base_model.model.` or both, one after the other.
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
_AUTOENCODER = re.compile(_PREFIXES + r"(encoder|decoder)[./]")

# What other files are known by, and called in messages.
_OTHERS = (
    (r"lora_(unet|transformer)_.*", "is a LoRA with kohya's names, whose underscores hide where modules end"),
    (r"(text_encoder|lora_te|te\d).*", "adapts text encoders, too"),
    (r".*(lora_magnitude_vector|dora_scale).*", "is a DoRA, which is no product A·B"),
    (r".*\.lora_B(\.\w+)?\.bias", "is a LoRA with biases (lora_bias)"),
    (r".*\.lokr_.*", "is a LoKr"),
    (r".*\.(hada_|loha_).*", "is a LoHa"),
    (r"diffusion_model\..*|model\.diffusion_model\..*", "is a LoRA with ComfyUI's names"),
    (r".*(\.lora|_lora|lora_linear_layer)\.(down|up)\.weight", "is a LoRA with diffusers' older names"),
)


class Names(NamedTuple):
    """What a file's names stand for.

    Attributes:
      tensors: `proj_out.lora_A.weight` -> the name in the file.
      alphas: `proj_out` -> the name of its alpha in the file.
      keys: `proj_out` -> what PEFT compares its patterns with.
    """

    tensors: dict[str, str]
    alphas: dict[str, str]
    keys: dict[str, str]


def part_of(names: Iterable[str]) -> Literal["transformer", "vae"]:
    """Which network an adapter file belongs to, by its module names, PEFT's or ours."""
    return "vae" if any(_AUTOENCODER.match(name) for name in names) else "transformer"


def understand(names: Iterable[str], source: object) -> Names:
    """Raises UserError for names that mean something else or that two tensors share."""
    names = list(names)
    _refuse_others(names, source)
    found = Names({}, {}, {})
    for name in names:
        match = _NAME.fullmatch(name)
        module, half = match["module"], match["half"]
        group, plain = (
            (found.tensors, f"{module}.lora_{_HALVES[half]}.weight") if half else (found.alphas, module)
        )
        if plain in group:
            raise UserError(f"{source}: {group[plain]} and {name} mean the same; keep one of them")
        group[plain] = name
        # PEFT sees the names below the model that it wraps; "transformer." is otherwise diffusers' own.
        found.keys[module] = "transformer." + module if match["peft"] and match["inner"] else module
    return found


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
