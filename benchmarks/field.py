"""All sides of a run, each kind in a process of its own."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.ours import Promptplex
from benchmarks.peft_sides import PeftGrouped, PeftOneAtATime, PeftPrompts
from benchmarks.processes import RemoteSide, SideProcess
from benchmarks.shared_engine import SharedEngine
from benchmarks.sides import Side
from benchmarks.transformers_sides import ContinuousBatch, StaticBatch
from benchmarks.vllm_side import Vllm, VllmProcess
from benchmarks.work import Work, random_model, random_prompts

PEERS = ("peft-single", "peft-grouped", "static", "generate-batch")


class Field:
    """Ours always, once more with one task to compare with; of the peers those that are named."""

    def __init__(self, works: Sequence[Work], peers: Collection[str]) -> None:
        self.processes: list[SideProcess] = []
        self._works = works
        self._stack = ExitStack()
        with_singles = [one for work in works for one in (work, replace(work, tasks=1))]
        self._add(SideProcess(build_ours, list(dict.fromkeys(with_singles))))
        self.ours = list(self.sides)
        if prompted := [work for work in works if work.virtual_tokens]:
            kinds = {"peft-single": PeftOneAtATime, "peft-grouped": PeftGrouped}
            if chosen := [kind for name, kind in kinds.items() if name in peers]:
                self._add(SideProcess(build_peft, prompted, chosen))
        # Virtual tokens and tasks change nothing for those who use no prompts.
        promptless = list({work.requests: work for work in works}.values())
        if "static" in peers:
            self._add(SideProcess(build_static, promptless))
        if "generate-batch" in peers:
            self._add(SideProcess(build_continuous, promptless))

    @property
    def sides(self) -> list[RemoteSide]:
        """All of them, process by process."""
        return [side for process in self.processes for side in process.sides]

    def add_vllm(self, python: Path, log: Path) -> None:
        """Start vLLM from its own virtual environment; its output goes to `log`."""
        self._add(SideProcess(build_vllm, self._works, python, log))

    def close(self) -> None:
        """End all processes."""
        self._stack.close()

    def _add(self, process: SideProcess) -> None:
        self._stack.callback(process.close)
        self.processes.append(process)


# Each runs in the process of its sides. The same seed gives all of them the same weights.


def build_ours(works: Sequence[Work]) -> list[Side]:
    """One engine for all works."""
    model = random_model(works[0].shape)
    prompts = [random_prompts(model, work) for work in works]
    shared = SharedEngine(model, works)
    return [Promptplex(shared, work, rows) for work, rows in zip(works, prompts, strict=True)]


def build_peft(works: Sequence[Work], kinds: Sequence[type[PeftOneAtATime | PeftGrouped]]) -> list[Side]:
    """One PeftModel with all prompts."""
    model = random_model(works[0].shape)
    peft = PeftPrompts(model)
    for work in works:
        peft.add(work, random_prompts(model, work))
    return [kind(peft, work) for work in works for kind in kinds]


def build_static(works: Sequence[Work]) -> list[Side]:
    """The bare model."""
    model = random_model(works[0].shape)
    return [StaticBatch(model, work) for work in works]


def build_continuous(works: Sequence[Work]) -> list[Side]:
    """A model for each: its manager is made for one size of work."""
    return [ContinuousBatch(random_model(work.shape), work) for work in works]


def build_vllm(works: Sequence[Work], python: Path, log: Path) -> list[Side]:
    """One vLLM for all works; this process is its client."""
    model = random_model(works[0].shape)
    process = VllmProcess(python, model, works, log)
    return [Vllm(process, work, random_prompts(model, work)) for work in works]
