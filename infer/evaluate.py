"""The command tsdsr-evaluate, from a checkout; the code is in tsdsr_jax/commands/evaluate.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.evaluate()
