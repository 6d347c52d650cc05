"""Tokens per second of mixed tasks, beside PEFT with the same requests grouped by task.

The work: a Qwen2-shaped model of 24 layers and 386M random bf16 weights, 8 soft prompts of 20
virtual tokens, 32 requests of 64 tokens, 32 new tokens each, greedy, no EOS. PEFT runs 8 groups of
4 with `set_adapter` between them, its best case: equal lengths, so no padding. The engine gets all
32 in a random order. Rounds alternate between the two, so that whatever else the machine does hits
both. Both sides share the same weights and prompts; the JSON also says how many of the first
tokens agree (random bf16 weights have ties, so this isn't expected to be all of them).

    python -m benchmarks.throughput --rounds 3 --out throughput.json

Not measured here: loading, the first use of a prompt (one warm-up round per side comes first),
tokenization, HTTP.
"""

import argparse
import copy
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from app.engine.engine import Engine, EngineConfig
from app.models.attention.packed import IMPLEMENTATION, register
from app.models.decoder_only import DecoderOnly
from app.models.geometry import model_geometry
from app.models.packed_linear import pack_linears
from app.prompt import Prompt, PromptKind
from app.request import Request
from app.store.canonical import RawTensor, read_prompt, write_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What both sides do; --tiny shrinks the model so that a test can run it."""

    layers: int = 24
    hidden: int = 896
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocabulary: int = 32_000
    tasks: int = 8
    requests: int = 32
    virtual_tokens: int = 20
    prompt_tokens: int = 64
    new_tokens: int = 32
    seed: int = 0


TINY = Work(layers=2, hidden=64, heads=4, intermediate=128, vocabulary=256, new_tokens=4)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the work: which task, and its tokens."""

    task: int
    token_ids: tuple[int, ...]


class MemorySource:
    """A PromptSource that holds every prompt already."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = {prompt.digest: prompt for prompt in prompts}

    def load(self, digest: str) -> "Future[Prompt]":
        """At once: nothing is read from anywhere."""
        future: Future[Prompt] = Future()
        future.set_result(self._prompts[digest])
        return future


class EngineSide:
    """Promptplex: all requests at once, in a random order."""

    def __init__(self, model: PreTrainedModel, work: Work, embeddings: Sequence[Tensor]) -> None:
        register()
        model.set_attn_implementation(IMPLEMENTATION)
        self._work = work
        self._prompts = [canonical_prompt(rows) for rows in embeddings]
        config = EngineConfig(max_rows=work.requests, kv_cache_bytes=kv_bytes(work))
        backbone = DecoderOnly(model, model_geometry(model, "benchmark"))
        pack_linears(model)  # as load_base does
        self.engine = Engine(backbone, MemorySource(self._prompts), config)
        self.engine.start()

    def run(self, asks: Sequence[Ask]) -> list[list[int]]:
        """New tokens of each ask, in the order of `asks`."""
        futures = [self.engine.submit(self._request(number, ask)) for number, ask in enumerate(asks)]
        return [list(future.result(timeout=600).token_ids) for future in futures]

    def _request(self, number: int, ask: Ask) -> Request:
        return Request(
            id=f"{time.perf_counter_ns()}-{number}",
            token_ids=ask.token_ids,
            prompt_digest=self._prompts[ask.task].digest,
            num_virtual_tokens=self._work.virtual_tokens,
            max_new_tokens=self._work.new_tokens,
            task=str(ask.task),
        )


class PeftSide:
    """PEFT: one adapter active at a time, so the requests are grouped by task."""

    def __init__(self, model: PreTrainedModel, work: Work, embeddings: Sequence[Tensor]) -> None:
        self._work = work
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=work.virtual_tokens)
        peft_model = get_peft_model(model, config, adapter_name="0")
        assert isinstance(peft_model, PeftModel)
        self._model = peft_model
        for task, rows in enumerate(embeddings):
            if task:
                peft_model.add_adapter(str(task), config)
            peft_model.get_parameter(f"prompt_encoder.{task}.embedding.weight").data.copy_(rows)
        peft_model.eval()

    def run(self, asks: Sequence[Ask]) -> list[list[int]]:
        """New tokens of each ask, in the order of `asks`."""
        answers: list[list[int]] = [[] for _ in asks]
        for task in range(self._work.tasks):
            group = [number for number, ask in enumerate(asks) if ask.task == task]
            for number, tokens in zip(group, self._generate(task, [asks[i] for i in group]), strict=True):
                answers[number] = tokens
        return answers

    @torch.inference_mode()
    def _generate(self, task: int, asks: Sequence[Ask]) -> list[list[int]]:
        self._model.set_adapter(str(task))
        ids = torch.tensor([ask.token_ids for ask in asks])
        output = self._model.generate(  # type: ignore[no-untyped-call]  # PEFT leaves it so
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._work.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        new: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return new


def random_model(work: Work) -> PreTrainedModel:
    """Random weights of the work's shape in bf16."""
    config = Qwen2Config(
        num_hidden_layers=work.layers,
        hidden_size=work.hidden,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        intermediate_size=work.intermediate,
        vocab_size=work.vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(work.seed)
    model: PreTrainedModel = Qwen2ForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)  # not the model's own `to`, whose annotations mislead mypy
    model.train(False).requires_grad_(False)
    return model


def canonical_prompt(rows: Tensor) -> Prompt:
    """A soft prompt `[p, d]` as the store would hold it."""
    raw = RawTensor("BF16", tuple(rows.shape), rows.contiguous().view(torch.uint8).numpy().tobytes())
    return read_prompt(write_prompt(PromptKind.SOFT, {"dec.embeds": raw}))


def kv_bytes(work: Work) -> int:
    """Room for every request and every prompt, twice: scarcity isn't what is measured here."""
    per_token = 2 * work.layers * work.kv_heads * (work.hidden // work.heads) * 2
    own = work.requests * (work.prompt_tokens + work.new_tokens)
    return 2 * per_token * (own + work.tasks * work.virtual_tokens + 4096)


def make_asks(work: Work) -> list[Ask]:
    """The requests in a random order: tasks are mixed, and no two prompts are alike."""
    generator = random.Random(work.seed)
    asks = [
        Ask(i % work.tasks, tuple(generator.randrange(3, work.vocabulary) for _ in range(work.prompt_tokens)))
        for i in range(work.requests)
    ]
    generator.shuffle(asks)
    return asks


def measure(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
            say(f"round {number + 1} of {rounds}: {name} {seconds[name][-1]:.2f} s")
    return seconds


def summarize(work: Work, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median tokens per second of each side, and their ratio."""
    tokens = work.requests * work.new_tokens
    rates = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    ratios = [peft / ours for peft, ours in zip(seconds["peft"], seconds["promptplex"], strict=True)]
    return {
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio_of_medians": round(rates["promptplex"] / rates["peft"], 2),
        "ratio_per_round": [round(ratio, 2) for ratio in ratios],
        "seconds": {name: [round(value, 3) for value in taken] for name, taken in seconds.items()},
    }


def agreement(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far the two sides say the same: shares of first tokens and of whole answers."""
    pairs = list(zip(left, right, strict=True))
    return {
        "first_token": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        "whole_answer": sum(list(a) == list(b) for a, b in pairs) / len(pairs),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def run_benchmark(work: Work, rounds: int) -> dict[str, Any]:
    """Build both sides, warm them up, measure, summarize."""
    say("making the model and the prompts")
    model = random_model(work)
    scale = float(model.get_parameter("model.embed_tokens.weight").float().std())
    embeddings = [
        (torch.randn(work.virtual_tokens, work.hidden) * scale).to(torch.bfloat16) for _ in range(work.tasks)
    ]
    asks = make_asks(work)
    ours, peft = EngineSide(copy.deepcopy(model), work, embeddings), PeftSide(model, work, embeddings)
    try:
        say("warming up")
        same = agreement(ours.run(asks), peft.run(asks))
        seconds = measure({"promptplex": lambda: ours.run(asks), "peft": lambda: peft.run(asks)}, rounds)
    finally:
        ours.engine.stop()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = {"parameters": parameters, **asdict(work)}
    return {"work": shape, "machine": machine(), "agreement": same, **summarize(work, seconds)}


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, run, write the JSON."""
    parser = argparse.ArgumentParser(description="Mixed tasks beside PEFT grouped by task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--virtual-tokens", type=int, default=Work().virtual_tokens)
    parser.add_argument("--tiny", action="store_true", help="a toy model: tries the script, measures nothing")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args(arguments)
    # PEFT repeats two notes that don't bear on this work.
    warnings.filterwarnings("ignore", message="Position ids are not supported|`is_gradient_checkpointing`")
    base = asdict(TINY if options.tiny else Work()) | {"virtual_tokens": options.virtual_tokens}
    result = json.dumps(run_benchmark(Work(**base), options.rounds), indent=2)
    print(result)
    if options.out is not None:
        options.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
