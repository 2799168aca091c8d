"""The command tsdsr-convert-lpips, from a checkout; the code is in tsdsr_jax/commands/convert_lpips.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.convert_lpips()
