"""Encoder-decoders beside their peers: ``python -m benchmarks.encoder_decoder``.

``work`` says what is asked, ``sides`` and ``compiled_sides`` are the sides, ``__main__`` lets them take
turns.
"""
