"""vLLM's CPU build in a virtual environment of its own, with prompts sent as `prompt_embeds`."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.saved_models import saved_model
from benchmarks.sides import Answer, Side
from benchmarks.work import Ask, Work, prompts_of_width, random_model
from benchmarks.worker import Worker

_WORKER = Path(__file__).with_name("vllm_worker.py")
_LIBRARIES = Path("/usr/lib")


class Vllm:
    """vLLM on one work. It has no prompts of its own, so every request brings its task's rows along."""

    name = "vLLM CPU, compiled, prompt_embeds"
    uses_prompts = True

    def __init__(self, process: "VllmProcess", work: Work, prompts: Sequence[Tensor]) -> None:
        self._process = process
        self.work = work
        self._prompts = prompts

    @torch.inference_mode()
    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Embed, concatenate, send: what the client of such a server does."""
        embedding = self._process.embedding
        rows = [torch.cat([self._prompts[ask.task], embedding[list(ask.token_ids)]]) for ask in asks]
        return self._process.answer(rows, self.work)

    def close(self) -> None:
        """End the process, which all works share."""
        self._process.close()


class VllmProcess:
    """One vLLM on the run's weights, for all works."""

    def __init__(self, python: Path, works: Sequence[Work], log: Path) -> None:
        model = saved_model(works[0].shape, partial(random_model, works[0].shape))
        self.embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
        self._folder = tempfile.TemporaryDirectory(prefix="promptplex-bench-")
        self._worker = Worker(python, _WORKER, model, log=log, environment=_environment(python))

    def answer(self, rows: Sequence[Tensor], work: Work) -> list[Answer]:
        """Answers to prompts of embeddings `[p + tokens, d]`."""
        file = Path(self._folder.name) / "embeds.safetensors"
        save_file({str(number): each for number, each in enumerate(rows)}, file)
        answers = self._worker.ask(embeds=str(file), new_tokens=work.new_tokens, sampling=dict(work.sampling))
        return [Answer(**{**line, "token_ids": tuple(line["token_ids"])}) for line in answers]

    def close(self) -> None:
        """End the program."""
        self._worker.close()
        self._folder.cleanup()


def _environment(python: Path) -> dict[str, str]:
    """What vLLM's documentation advises on a CPU, and all cores: by default it leaves one to itself."""
    preloaded = [*_LIBRARIES.glob("*/libtcmalloc_minimal.so.4"), python.parent.parent / "lib" / "libiomp5.so"]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{torch.get_num_threads() - 1}",
        "LD_PRELOAD": ":".join(str(file) for file in preloaded if file.is_file()),
        "VLLM_NO_USAGE_STATS": "1",
    }


def build_vllm(works: Sequence[Work], python: Path, log: Path) -> list[Side]:
    """One vLLM for all works; this process is its client."""
    process = VllmProcess(python, works, log)
    width = float(process.embedding.float().std())
    return [Vllm(process, work, prompts_of_width(width, work)) for work in works]
