"""The command tsdsr-prepare, from a checkout; the code is in tsdsr_jax/commands/prepare.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.prepare()
