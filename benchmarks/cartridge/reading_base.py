"""A base that answers from documents of 2,000 tokens: a Llama of two layers, trained on made registers.

The demo's bases have 512 positions and have read nothing long. This one starts from heads that can recall,
and learns the rest (what a question is, how an answer ends, not to mix up what is alike) in a few hundred
steps over ever longer registers.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.cartridge.registers import EOS, POSITIONS, TEMPLATE, WORDINGS, make_register, make_tokenizer

_RATE, _WARMUP = 1e-3, 100  # of learning; steps
_MEMORY = 0.97  # of the running accuracy
_ROPE_THETA = 1e8  # most angles of a head are slow, so that what it compares doesn't depend on the distance
_OWN = 64  # channels of the residual stream that a token's embedding takes at the start
_TWO, _FOUR, _ONE = (
    range(64, 96),
    range(96, 128),
    range(128, 160),
)  # channels of what stands so many places back
_SLOW = 12  # pairs of a head from which on angles are slow
_WEIGHTS = {"document": 0.02, "question": 0.5, "answer": 1.0}  # of a token in the loss


@dataclass(frozen=True, slots=True)
class Stage:
    """Registers of up to so many facts, until so many answers are right."""

    num_facts: int
    num_questions: int
    rows: int  # of a step
    max_steps: int
    enough: float


STAGES = (
    Stage(12, 16, 24, 400, 0.97),
    Stage(48, 32, 8, 400, 0.97),
    Stage(128, 64, 4, 400, 0.97),
    Stage(285, 96, 2, 150, 1.0),
)


def make_reading_base(
    directory: Path, say: Callable[[str], None], stages: tuple[Stage, ...] = STAGES
) -> None:
    """Train the base with one thread, and save it with its tokenizer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    _train(model, _Rows(tokenizer), stages, say)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """Return the model before its first step: 160 wide, four heads of 64."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=160,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
            initializer_range=0.024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    _set_heads(model)
    return model


@torch.no_grad()
def _set_heads(model: LlamaForCausalLM) -> None:
    """Let training start from heads that recall, which otherwise come about late.

    In layer 0 heads look one, two and four places back, where lines and questions have role and town, and
    write what is there into channels of their own. In layer 1 three heads compare what is two and four places
    back, and copy: the person, where an answer begins. The last one finds a town with a line about the role
    that a question has just named.
    """
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, : _OWN - 1].normal_(std=0.1)
    embedding[:, _OWN - 1] = 0.8  # what all have in common
    first, second = (layer.self_attn for layer in model.model.layers)
    near, far = (torch.linalg.qr(torch.randn(_OWN - 1, _OWN - 1)).Q[:32] for _ in range(2))
    for head, (places, seen, channels) in enumerate(((2, near, _TWO), (4, far, _FOUR), (1, near, _ONE))):
        _look_back(first, head, places)
        _copy(first, head, seen, channels, strength=1.0)
    for head, width in enumerate((21, 21, 21)):
        _compare(second, head, [*_TWO, *_FOUR], [*_TWO, *_FOUR])
        own = torch.eye(_OWN - 1)[width * head : width * (head + 1)]
        _copy(second, head, own, range(width * head, width * (head + 1)), strength=1.5)
    _compare(second, 3, [*_ONE], [*_TWO])
    _copy(second, 3, torch.eye(_OWN - 1), range(_OWN - 1), strength=1.0)


def _look_back(attention: Any, head: int, places: int) -> None:
    """Turn the constant part of queries against that of keys by the angles of so many places."""
    pairs = attention.head_dim // 2
    angles = -(_ROPE_THETA ** (-torch.arange(pairs) / pairs)) * places
    strength = 0.9 * (torch.arange(pairs) < 10)
    rows = slice(head * 2 * pairs, (head + 1) * 2 * pairs)
    attention.q_proj.weight[rows, _OWN - 1] = torch.cat([strength * angles.cos(), strength * angles.sin()])
    attention.k_proj.weight[rows, _OWN - 1] = torch.cat([strength, torch.zeros(pairs)])


def _compare(attention: Any, head: int, of_query: list[int], of_key: list[int]) -> None:
    """Take queries and keys alike from channels that layer 0 writes."""
    pairs = attention.head_dim // 2
    slow = torch.arange(_SLOW, pairs)
    rows = torch.cat([slow, pairs + slow])[: len(of_query), None] + head * 2 * pairs
    basis = 1.6 * torch.linalg.qr(torch.randn(len(of_query), len(rows))).Q.T
    attention.q_proj.weight[rows, torch.tensor(of_query)] = basis
    attention.k_proj.weight[rows, torch.tensor(of_key)] = basis


def _copy(attention: Any, head: int, seen: Tensor, channels: range, strength: float) -> None:
    """Add what a head sees of the embedding to channels, one for each row of `seen`."""
    first, number = head * attention.head_dim, len(seen)
    attention.v_proj.weight[first : first + number, : _OWN - 1] = seen
    attention.o_proj.weight[list(channels), first : first + number] += strength * torch.eye(number)


class _Rows:
    """Token ids of registers with questions and answers, and the weight of each token in the loss."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def batch(self, rng: random.Random, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return ids `[rows, tokens]` and weights of the same shape."""
        num_facts = rng.randint(stage.num_facts // 4, stage.num_facts)
        made = [self._row(rng, num_facts, stage.num_questions) for _ in range(stage.rows)]
        longest = max(map(len, made))
        padded = [row + [(1, 0.0)] * (longest - len(row)) for row in made]
        ids, weights = torch.tensor(padded, dtype=torch.float64).unbind(-1)
        return ids.long(), weights.float()

    def _row(self, rng: random.Random, num_facts: int, num_questions: int) -> list[tuple[int, float]]:
        facts = make_register(rng, num_facts)
        parts = [(fact.sentence, "document") for fact in facts]
        for fact in rng.choices(facts, k=num_questions):
            question = fact.question(rng.choice(WORDINGS))
            parts.append((TEMPLATE.format(question=question), "question"))
            parts.append((f" {fact.person}{EOS}", "answer"))
        return [(id_, _WEIGHTS[part]) for text, part in parts for id_ in self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]


def _train(
    model: LlamaForCausalLM, rows: _Rows, stages: tuple[Stage, ...], say: Callable[[str], None]
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng, steps = random.Random(20260), count(1)
    for number, stage in enumerate(stages):
        is_last, right = number == len(stages) - 1, 0.0
        for place in range(stage.max_steps):
            rate = _RATE * (1 - 0.95 * place / stage.max_steps if is_last else 1)
            step = next(steps)
            optimizer.param_groups[0]["lr"] = rate * min(1, step / _WARMUP)
            right = _MEMORY * right + (1 - _MEMORY) * _step(model, optimizer, *rows.batch(rng, stage))
            if step % 25 == 0:
                say(f"step {step}: {stage.num_facts} facts, {right:.1%} right")
            if right > stage.enough:
                break


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, weights: Tensor) -> float:
    """Learn from one batch; return the share of answers that were right."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1).float()
    targets, weights = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = functional.cross_entropy(logits, targets, reduction="none")
    ((losses * weights).sum() / weights.sum()).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    is_answer = (weights == _WEIGHTS["answer"]) & (targets != 0)
    return float((logits.argmax(-1) == targets)[is_answer].float().mean())
