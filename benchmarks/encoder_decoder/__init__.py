"""Encoder-decoders beside their peers, in the works `t5` and `bart` of ``python -m benchmarks``.

``work`` says what is asked, ``sides`` and ``compiled_sides`` are the sides.
"""
