"""Promptplex beside its peers: the same work, on the same weights, in the same seconds.

``python -m benchmarks`` (``make bench``). ``works`` names what is measured, ``work`` says what a work is and
``sides`` what a side is; ``ours``, ``peft_sides``, ``transformers_sides``, ``vllm_side`` and
``compiled_sides`` are the sides, and ``peers`` starts them; ``rounds`` lets them take turns, ``limits`` says
what the hardware could do, ``report``, ``tables`` and ``plots`` show what came of it.
"""
