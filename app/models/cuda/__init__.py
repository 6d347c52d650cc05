"""Kernels for GPUs, in Triton; each is compared with torch before it is used."""
