"""Faster modules and kernels for bf16 on CPUs."""
