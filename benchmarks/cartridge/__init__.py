"""A cartridge beside the document in context: ``python -m benchmarks.cartridge``.

A small base that reads documents of 2,000 tokens is made first, in some minutes on one core.
"""
