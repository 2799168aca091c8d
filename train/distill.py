"""The command tsdsr-distill, from a checkout; the code is in tsdsr_jax/commands/distill.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.distill()
