"""Kernels of our own for CPUs, in C++: compiled where there is a compiler, checked before they are used."""
