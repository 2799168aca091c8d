"""The command tsdsr-app, from a checkout; the code is in tsdsr_jax/commands/app.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.app()
