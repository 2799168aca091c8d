"""The command tsdsr-autoencoder, from a checkout; the code is in tsdsr_jax/commands/autoencoder.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.autoencoder()
