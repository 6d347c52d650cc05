"""Encoder-decoders over HTTP: mixed tasks in crowded batches, each answer as PEFT gives it alone.

Prompts are pushed to the running server: PEFT's own files, and canonical files for what PEFT can't express.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import PreTrainedModel

from app.api.state import ServerState
from app.models.backbones import backbone_of
from app.models.geometry import model_geometry
from app.prompt import PromptKind, TaskType
from app.sites import Embedding, Site
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from tests.api.server import client_of, services_of, serving
from tests.oracle import Expected, saved, tuned
from tests.seq2seq import (
    BART_LIKE,
    FAMILIES,
    Learned,
    greedy_seq2seq,
    packed_copy,
    peft_configs,
    random_decoder_rows,
    random_prefix,
    reference,
    source_tokenizer,
    tiny_seq2seq,
)
from tests.serving.stack import Stack, stack_of

LOGPROB_TOLERANCE = 1e-4
NEW_TOKENS = 12
BUDGET = 40
WORDS = ["the", "film", "was", "great", "food", "cold", "what a", "Blue Door", "riverside", "Thai", "1 2 3"]


@dataclass(frozen=True)
class Task:
    """A task, what was pushed for it, and its oracle."""

    name: str | None
    files: dict[str, bytes]
    alone: Callable[[list[int], int], Expected]


def tasks_of(family: str, base: PreTrainedModel, root: Path) -> list[Task]:
    """The base, each kind of PEFT's prompts, and canonical prompts at places that PEFT doesn't know."""
    tasks = [Task(None, {}, partial(greedy_seq2seq, base))]
    for seed, (name, config) in enumerate(peft_configs(base).items()):
        model = tuned(tiny_seq2seq(family), config, seed=seed)
        weights, settings = saved(model, root / name)
        tasks.append(Task(name, {"prompt": weights, "config": settings}, partial(greedy_seq2seq, model)))
    canonical = {
        "decoder-rows": random_decoder_rows(base, 5, seed=7),
        "cross-only": random_prefix(base, {Site.DECODER_CROSS: 4}, seed=8),
    }
    if family in BART_LIKE:
        sites = {Site.ENCODER_SELF: 3, Site.DECODER_SELF: 6, Site.DECODER_CROSS: 2}
        canonical["three-sites"] = random_prefix(base, sites, seed=9)
    for name, learned in canonical.items():
        tasks.append(Task(name, {"prompt": canonical_file(learned)}, partial(reference, base, learned)))
    return tasks


def canonical_file(learned: Learned) -> bytes:
    """The one file of a prompt, whatever its places."""
    tensors = {
        site.tensor(layer, side): tensor
        for (site, layer), pair in learned.sites.items()
        for side, tensor in zip("kv", pair, strict=True)
    }
    if learned.decoder_rows is not None:
        tensors[Embedding.DECODER] = learned.decoder_rows
    raw = {
        name: RawTensor("F32", tuple(tensor.shape), np.ascontiguousarray(tensor.numpy()).tobytes())
        for name, tensor in tensors.items()
    }
    kind = PromptKind.PREFIX if learned.sites else PromptKind.SOFT
    offset = 0 if learned.decoder_rows is None else len(learned.decoder_rows)
    return make_prompt(kind, raw, task_type=TaskType.SEQ_2_SEQ_LM, position_offset=offset).data


@contextmanager
def server_of(
    family: str,
    root: Path,
    base: PreTrainedModel | None = None,
    generation: Mapping[str, Any] | None = None,
    **config: Any,
) -> Iterator[tuple[Stack, httpx.Client]]:
    """`base`: one of the family, of another shape; `generation`: of its generation config."""
    base = base or tiny_seq2seq(family)
    base.generation_config.update(**generation or {})
    packed = packed_copy(base)
    backbone = backbone_of(packed, model_geometry(packed, "tiny"))
    start = base.generation_config.decoder_start_token_id
    settings = {"token_budget": BUDGET, "block_size": 4} | config
    with (
        stack_of(base, backbone, source_tokenizer(family), root, decoder_start_id=start, **settings) as stack,
        serving(ServerState(services=services_of(stack))) as url,
        client_of(url) as client,
    ):
        yield stack, client


def push(client: httpx.Client, task: Task) -> None:
    if task.name is not None:
        files = {name: (name, data) for name, data in task.files.items()}
        answer = client.post(f"/tasks/{task.name}/versions", files=files)
        assert answer.status_code == 201, answer.text


def texts(rng: random.Random, count: int) -> list[str]:
    """Short and long ones, some with more tokens than a step takes."""
    return [" ".join(rng.choices(WORDS, k=rng.choice([1, 2, 5, 12, 30]))) for _ in range(count)]


def ask(client: httpx.Client, task: str | None, text: str, **parameters: Any) -> dict[str, Any]:
    body = {"task_id": task, "inputs": text, "parameters": {"max_new_tokens": NEW_TOKENS, **parameters}}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def difference(found: dict[str, Any], expected: Expected) -> str | None:
    """What is wrong with an answer, if anything."""
    tokens = [token["id"] for token in found["details"]["tokens"]]
    if tokens != expected.tokens:
        return f"tokens {tokens} instead of {expected.tokens}"
    logprobs = [token["logprob"] for token in found["details"]["tokens"]]
    worst = max(abs(a - b) for a, b in zip(logprobs, expected.logprobs, strict=True))
    return f"log-probability off by {worst:.1e}" if worst > LOGPROB_TOLERANCE else None


def compare(family: str, root: Path, *, num_requests: int, num_texts: int, **config: Any) -> Stack:
    """Send mixed requests at once, and compare each with what it gives alone."""
    rng = random.Random(family)
    with server_of(family, root / "store", **config) as (stack, client):
        tasks = tasks_of(family, stack.base, root)
        for task in tasks:
            push(client, task)
        stack.steps.clear()
        pairs = [(task, text) for task in tasks for text in texts(rng, num_texts)]
        asked = [pairs[number % len(pairs)] for number in range(num_requests)]
        rng.shuffle(asked)
        with ThreadPoolExecutor(2 * stack.engine.max_rows) as senders:
            found = list(senders.map(lambda pair: ask(client, pair[0].name, pair[1]), asked))
        tokenizer = source_tokenizer(family)
        alone = {
            (task.name, text): task.alone(tokenizer(text)["input_ids"], NEW_TOKENS) for task, text in pairs
        }
    problems = [
        f"{task.name}: {problem}"
        for (task, text), answer in zip(asked, found, strict=True)
        if (problem := difference(answer, alone[task.name, text]))
    ]
    assert not problems, problems[:5]
    assert len({tuple(each.tokens) for each in alone.values()}) > len(pairs) / 3, "answers vary"
    assert any(len(tokenizer(text)["input_ids"]) > BUDGET for _, text in pairs), "some are beyond the budget"
    return stack


# Rows that run at once, K/V memory in bytes, and the least rows and preemptions that are to be seen.
ALONE = {"max_rows": 1, "kv_cache_bytes": 1 << 20}, 1, 0
CROWDED = {"max_rows": 32, "kv_cache_bytes": 1 << 22}, 16, 0
SCARCE = {"max_rows": 16, "kv_cache_bytes": 90_000}, 2, 1


@pytest.mark.parametrize(("family", "how"), [("t5_gated", SCARCE), ("bart", CROWDED)])
def test_a_mixed_batch_answers_as_each_request_alone(family: str, how: Any, tmp_path: Path) -> None:
    config, rows, preempted = how
    stack = compare(family, tmp_path, num_requests=64, num_texts=3, **config)
    check_crowd(stack, rows, preempted)


@pytest.mark.soak
@pytest.mark.parametrize("how", [ALONE, CROWDED, SCARCE], ids=["alone", "crowded", "scarce"])
@pytest.mark.parametrize("family", FAMILIES)
def test_200_mixed_requests_of_every_family(family: str, how: Any, tmp_path: Path) -> None:
    config, rows, preempted = how
    stack = compare(family, tmp_path, num_requests=200, num_texts=6, **config)
    check_crowd(stack, rows, preempted)


def check_crowd(stack: Stack, rows: int, preempted: int) -> None:
    """The batch was as full, as mixed and as short of memory as it was to be."""
    assert max(step.num_decode_rows for step in stack.steps) >= rows
    assert rows == 1 or max(step.num_distinct_tasks for step in stack.steps) >= 3
    assert sum(step.num_preempted for step in stack.steps) >= preempted
    assert max(step.num_sources for step in stack.steps) > (rows > 1)
