"""Attention on NVIDIA GPUs: the kernels. host/ hands them arrays and launches them.

Nothing here is imported before the first call that asks for a GPU.
"""

INSTALL = "pip install numba-attn[cuda13] (or [cuda12] for a driver older than 580)"
