"""TSD-SR in JAX: one-step super-resolution of photographs on Stable Diffusion 3."""

__version__ = "0.1.0"
