"""All entrants of a run. Sides of one kind share their model, and their engine or process."""

import copy
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.ours import Promptplex, SharedEngine
from benchmarks.peft_sides import PeftGrouped, PeftOneAtATime, PeftPrompts
from benchmarks.rounds import Entrant
from benchmarks.sides import Side
from benchmarks.transformers_sides import ContinuousBatch, StaticBatch
from benchmarks.vllm_side import Vllm, VllmProcess
from benchmarks.work import Work, make_asks, random_prompts

PEERS = ("peft-single", "peft-grouped", "static", "generate-batch")


class Field:
    """Ours always, once more with one task to compare with; of the peers those that are named."""

    def __init__(self, model: PreTrainedModel, works: Sequence[Work], peers: Collection[str]) -> None:
        self.entrants: list[Entrant] = []
        self._model = model
        self._works = works
        self._stack = ExitStack()
        singles = [replace(work, tasks=1) for work in works]
        mine = list(dict.fromkeys([*works, *singles]))
        self.engine = SharedEngine(copy.deepcopy(model), mine)
        self._stack.callback(self.engine.close)
        for work in mine:
            self._add(Promptplex(self.engine, work, random_prompts(model, work)), work)
        self._add_peft(peers)
        self._add_promptless(peers)

    def close(self) -> None:
        """End engines, threads and processes."""
        self._stack.close()

    def add_vllm(self, python: Path, log: Path) -> None:
        """Start vLLM from its own virtual environment; its output goes to `log`."""
        process = VllmProcess(python, self._model, self._works, log)
        self._stack.callback(process.close)
        for work in self._works:
            self._add(Vllm(process, work, random_prompts(self._model, work)), work)

    def _add(self, side: Side, work: Work) -> None:
        self._stack.callback(side.close)
        self.entrants.append(Entrant(side, work, make_asks(work)))

    def _add_peft(self, peers: Collection[str]) -> None:
        peft = PeftPrompts(self._model)
        for work in self._works:
            if work.virtual_tokens:
                peft.add(work, random_prompts(self._model, work))
                if "peft-single" in peers:
                    self._add(PeftOneAtATime(peft, work), work)
                if "peft-grouped" in peers:
                    self._add(PeftGrouped(peft, work), work)

    def _add_promptless(self, peers: Collection[str]) -> None:
        """Once for each number of requests: virtual tokens and tasks change nothing for them."""
        for work in {work.requests: work for work in self._works}.values():
            if "static" in peers:
                self._add(StaticBatch(self._model, work), work)
            if "generate-batch" in peers:
                self._add(ContinuousBatch(copy.deepcopy(self._model), work), work)
