"""Promptplex beside its peers: the same work, on the same weights, in one run.

``python -m benchmarks`` (``make bench``). ``work`` says what is asked, ``sides`` what a
side is; ``ours``, ``peft_sides``, ``transformers_sides`` and ``vllm_side`` are the sides, and ``field``
gathers them; ``rounds`` lets them take turns, ``limits`` says what the hardware could do, ``report`` and
``plots`` show what came of it.
"""
