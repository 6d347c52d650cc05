"""CTranslate2 and OpenVINO on an encoder-decoder without prompts, in another virtual environment."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.encoder_decoder.work import EncoderDecoderShape, SourceWork, random_encoder_decoder
from benchmarks.saved_models import saved_model
from benchmarks.sides import Answer, Side
from benchmarks.work import Ask
from benchmarks.worker import Worker

_PROGRAM = Path(__file__).with_name("compiled_worker.py")


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime and the precision that it computes in."""

    name: str
    package: str  # whose module must be there
    worker: str  # its name in the worker
    precision: str


RUNTIMES = {
    "ctranslate2": Runtime("CTranslate2, no prompts", "ctranslate2", "ctranslate2", "bfloat16"),
    "ctranslate2-int8": Runtime("CTranslate2 int8, no prompts", "ctranslate2", "ctranslate2", "int8"),
    "openvino": Runtime("OpenVINO, no prompts", "optimum.intel.openvino", "openvino", "bf16"),
}


class Compiled:
    """One runtime on one work."""

    uses_prompts = False

    def __init__(self, name: str, worker: Worker, work: SourceWork) -> None:
        self.name = name
        self.work = work
        self._worker = worker

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """One call."""
        answers = self._worker.ask(
            sources=[ask.token_ids for ask in asks],
            new_tokens=self.work.new_tokens,
            num_beams=self.work.num_beams,
        )
        return [Answer(token_ids=tuple(row)) for row in answers]

    def close(self) -> None:
        """End the program, which all works share."""
        self._worker.close()


def _model(shape: EncoderDecoderShape) -> PreTrainedModel:
    model = random_encoder_decoder(shape)
    # Fields that transformers no longer writes and CTranslate2 looks for.
    model.config.update(
        {"normalize_before": False, "normalize_embedding": True, "decoder_start_token_id": shape.start_id}
    )
    return model


def build_compiled(works: Sequence[SourceWork], runtime: Runtime, python: Path, log: Path) -> list[Side]:
    """One program for all works; this process is its client."""
    shape = works[0].shape
    model = saved_model(shape, partial(_model, shape), eos="t1" if shape.family == "t5" else "t2")
    arguments = (runtime.worker, runtime.precision, model, torch.get_num_threads())
    worker = Worker(python, _PROGRAM, *arguments, log=log, environment={})
    return [Compiled(runtime.name, worker, work) for work in works]
