"""How the demo base model and its prompts were made: ``python -m demo.recipes.build`` runs it all.

``lexicon`` and ``names`` (words) -> ``reviews``, ``utterances``, ``records``, ``dates``, ``arithmetic``,
``wordplay`` and ``prose`` (examples; ``splits`` says which are held out) -> ``instructions`` and ``corpus``
(documents) -> ``tokenizer`` and ``rows`` -> ``pretrain`` -> ``tasks`` and ``prompts`` (``app/training`` on
the frozen base) and ``heldout`` (their files) -> ``publish`` and ``more`` (into the store) -> ``measure``
(through a running server, and by ``oracle``, which is PEFT alone) and ``programs`` (chains, votes, ensembles,
instructions and decisions). ``reductions`` are ``arithmetic`` for a chain.
"""
