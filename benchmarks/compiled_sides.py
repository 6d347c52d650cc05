"""OpenVINO GenAI and CTranslate2 on a decoder, without prompts, each in another virtual environment."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.saved_models import saved_model
from benchmarks.sides import Answer, Side
from benchmarks.work import Ask, Work, random_model
from benchmarks.worker import Worker


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime that reads a directory and takes token ids."""

    name: str
    package: str  # whose module must be there
    program: Path


RUNTIMES = {
    "openvino": Runtime(
        "OpenVINO GenAI, no prompts", "openvino_genai", Path(__file__).with_name("openvino_worker.py")
    ),
    "ctranslate2": Runtime(
        "CTranslate2, no prompts", "ctranslate2", Path(__file__).with_name("ctranslate2_worker.py")
    ),
}


class Compiled:
    """One runtime on one work."""

    uses_prompts = False

    def __init__(self, name: str, worker: Worker, work: Work) -> None:
        self.name = name
        self.work = work
        self._worker = worker

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """One call."""
        answers = self._worker.ask(
            prompts=[ask.token_ids for ask in asks],
            new_tokens=self.work.new_tokens,
            sampling=dict(self.work.sampling),
        )
        return [Answer(token_ids=tuple(row)) for row in answers]

    def close(self) -> None:
        """End the program, which all works share."""
        self._worker.close()


def build_compiled(works: Sequence[Work], runtime: Runtime, python: Path, log: Path) -> list[Side]:
    """One program for all works; this process is its client."""
    model = saved_model(works[0].shape, partial(random_model, works[0].shape))
    threads, most = torch.get_num_threads(), max(work.requests for work in works)
    worker = Worker(python, runtime.program, model, threads, most, log=log, environment={})
    return [Compiled(runtime.name, worker, work) for work in works]
