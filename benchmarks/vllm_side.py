"""vLLM's CPU build in a virtual environment of its own, with prompts sent as `prompt_embeds`."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.sides import Answer
from benchmarks.work import Ask, Work, embedding_of

_WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmProcess:
    """One vLLM on the run's weights, for all works."""

    def __init__(self, python: Path, model: PreTrainedModel, works: Sequence[Work], log: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="promptplex-bench-")
        model.save_pretrained(self._folder.name)
        longest = max(work.virtual_tokens + work.prompt_tokens + work.new_tokens for work in works)
        most = max(work.requests for work in works)
        self._log = log
        self.embedding = embedding_of(model)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(python), str(_WORKER), self._folder.name, str(longest), str(most)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._receive()

    def ask(self, embeds: dict[str, Tensor], new_tokens: int) -> list[dict[str, Any]]:
        """Answers to prompts of embeddings `[p + tokens, d]`."""
        file = Path(self._folder.name) / "embeds.safetensors"
        save_file(embeds, file)
        assert self._process.stdin is not None
        print(
            json.dumps({"embeds": str(file), "new_tokens": new_tokens}), file=self._process.stdin, flush=True
        )
        answers: list[dict[str, Any]] = self._receive()["answers"]
        return answers

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with status {self._process.wait()}; see {self._log}")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """End it, if it hasn't ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._folder.cleanup()


class Vllm:
    """vLLM on one work. It has no prompts of its own, so every request brings its task's rows along."""

    name = "vLLM CPU, compiled, prompt_embeds"
    uses_prompts = True

    def __init__(self, process: VllmProcess, work: Work, prompts: Sequence[Tensor]) -> None:
        self._process = process
        self.work = work
        self._prompts = prompts

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Embed, concatenate, send: what the client of such a server does."""
        embed = self._process.embedding
        rows = [torch.cat([self._prompts[ask.task], embed(torch.tensor(ask.token_ids))]) for ask in asks]
        embeds = {str(number): tensor for number, tensor in enumerate(rows)}
        answers = self._process.ask(embeds, self.work.new_tokens)
        return [Answer(**{**line, "token_ids": tuple(line["token_ids"])}) for line in answers]

    def close(self) -> None:
        """End the process, which all works share."""
        self._process.close()
