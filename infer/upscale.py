"""The command tsdsr-upscale, from a checkout; the code is in tsdsr_jax/commands/upscale.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.upscale()
