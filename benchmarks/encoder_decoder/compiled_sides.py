"""CTranslate2 and OpenVINO without prompts, each in a virtual environment that may have it or not."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.encoder_decoder.work import EncoderDecoderShape, SourceWork, random_encoder_decoder
from benchmarks.sides import Answer, Side
from benchmarks.work import Ask

_WORKER = Path(__file__).with_name("compiled_worker.py")


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime and the precision that it computes in."""

    name: str
    package: str  # whose module must be there
    worker: str  # its name in the worker
    precision: str

    def reason_to_skip(self, python: Path) -> str | None:
        """Return why it can't run with this Python; None: it can."""
        command = [str(python), "-c", f"import {self.package}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return None
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{python} can't import {self.package} ({last}); name another one with --compiled-python"


RUNTIMES = {
    "ctranslate2-bf16": Runtime("CTranslate2 bf16, no prompts", "ctranslate2", "ctranslate2", "bfloat16"),
    "ctranslate2-int8": Runtime("CTranslate2 int8, no prompts", "ctranslate2", "ctranslate2", "int8"),
    "openvino-bf16": Runtime("OpenVINO bf16, no prompts", "optimum.intel.openvino", "openvino", "bf16"),
}


class Compiled:
    """One runtime on one work."""

    uses_prompts = False

    def __init__(self, worker: "Worker", work: SourceWork) -> None:
        self.name = worker.runtime.name
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
        """End the worker, which all works share."""
        self._worker.close()


class Worker:
    """A process of another Python with the runtime on the run's weights."""

    def __init__(self, runtime: Runtime, python: Path, shape: EncoderDecoderShape, log: Path) -> None:
        self.runtime = runtime
        self._log = log
        self._folder = tempfile.TemporaryDirectory(prefix="promptplex-bench-")
        _save(shape, Path(self._folder.name))
        command = [python, _WORKER, runtime.worker, runtime.precision, self._folder.name]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [*map(str, command), str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._receive()

    def ask(self, **given: Any) -> list[list[int]]:
        """Return the answers to what the worker is given."""
        assert self._process.stdin is not None
        print(json.dumps(given), file=self._process.stdin, flush=True)
        answers: list[list[int]] = self._receive()["answers"]
        return answers

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status, last = self._process.wait(), self._log.read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"it ended with status {status}: {''.join(last)}")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """End it, if it hasn't ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._folder.cleanup()


def _save(shape: EncoderDecoderShape, folder: Path) -> None:
    """Save the weights, and a tokenizer in which the token of id n is `tn`."""
    model = random_encoder_decoder(shape)
    # Fields that transformers no longer writes and CTranslate2 looks for.
    model.config.update({"normalize_before": False, "normalize_embedding": True})
    model.save_pretrained(folder)
    vocabulary = {f"t{number}": number for number in range(shape.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t2")),
        pad_token="t0",
        eos_token="t1" if shape.family == "t5" else "t2",
        bos_token="t0",
        unk_token="t2",
    )
    tokenizer.save_pretrained(folder)


def build_compiled(works: Sequence[SourceWork], runtime: Runtime, python: Path, log: Path) -> list[Side]:
    """One worker for all works; this process is its client."""
    worker = Worker(runtime, python, works[0].shape, log)
    return [Compiled(worker, work) for work in works]
