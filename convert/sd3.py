"""The command tsdsr-convert-sd3, from a checkout; the code is in tsdsr_jax/commands/convert_sd3.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.convert_sd3()
