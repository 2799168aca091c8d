"""The command tsdsr-convert-lora, from a checkout; the code is in tsdsr_jax/commands/convert_lora.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.convert_lora()
