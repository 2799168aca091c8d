"""The command tsdsr-convert-prompts, from a checkout; the code is in tsdsr_jax/commands/convert_prompts.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.convert_prompts()
