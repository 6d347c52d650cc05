"""What only a GPU can show, in one command for a bare machine: ``python -m benchmarks.gpu``.

It needs torch, transformers, triton and PEFT alone, downloads nothing, and takes less than eight minutes.
``parts`` names what is run, each in a process of its own (``apart``) that adds to a report (``findings``):
``facts``, ``exactness`` over tiny models (``tiny``), ``kernels`` over ``cases``, ``throughput`` of random
models (``shapes``), ``sanitizer``. ``switches`` builds engines with parts of the GPU's path switched off.
``turns`` lets sides take turns; ``goals``, ``table`` and ``plots`` show what came of it.
"""
