"""The command tsdsr-teacher, from a checkout; the code is in tsdsr_jax/commands/teacher.py."""

from tsdsr_jax.commands import entry

if __name__ == "__main__":
    entry.teacher()
