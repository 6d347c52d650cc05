"""What every side does: random weights of a given shape, random prompts, random requests.

Shapes of tensors: p virtual tokens, d hidden size.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen2 decoder. Head width is `hidden / heads`; embeddings are tied."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in bf16: kappa of docs/benchmarks.md."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * 2


SHAPES = {
    "qwen2-0.4b": Shape(layers=24, hidden=896, heads=14, kv_heads=2, intermediate=4864, vocabulary=32_000),
    "tiny": Shape(layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=256),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Requests of equal length, greedy, without EOS, all there at once."""

    shape: Shape
    tasks: int = 8
    requests: int = 32
    virtual_tokens: int = 20  # p of every task's soft prompt; 0: no prompts
    prompt_tokens: int = 64
    new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.tasks, self.requests, self.prompt_tokens, self.new_tokens) < 1 or self.virtual_tokens < 0:
            raise ValueError("tasks, requests and tokens must be at least 1, virtual tokens at least 0")
        if self.tasks > self.requests:
            raise ValueError(f"{self.requests} requests can't have {self.tasks} tasks")

    @property
    def label(self) -> str:
        """What tells it from the other works of a run."""
        return f"p={self.virtual_tokens}, {self.tasks} task{'s' if self.tasks > 1 else ''}"

    @property
    def promptless_label(self) -> str:
        """What tells it from the other works of a run where no prompts are used."""
        return f"{self.requests} requests"

    @property
    def rows(self) -> int:
        """Sequences that run at once."""
        return self.requests

    @property
    def slots(self) -> int:
        """Slots of the K/V cache that all requests take, without their tasks' prompts."""
        return self.requests * (self.prompt_tokens + self.new_tokens)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: which task, and its own tokens."""

    task: int
    token_ids: tuple[int, ...]


def make_asks(work: Work) -> list[Ask]:
    """The requests in a random order: tasks are mixed, and no two prompts are alike."""
    generator = random.Random(work.seed)
    asks = [
        Ask(
            number % work.tasks,
            tuple(generator.randrange(3, work.shape.vocabulary) for _ in range(work.prompt_tokens)),
        )
        for number in range(work.requests)
    ]
    generator.shuffle(asks)
    return asks


def random_model(shape: Shape, seed: int = 0) -> PreTrainedModel:
    """Random bf16 weights, frozen. Nothing is downloaded."""
    config = Qwen2Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = Qwen2ForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)  # not the model's own `to`, whose annotations mislead mypy
    model.train(False).requires_grad_(False)
    return model


def random_prompts(model: PreTrainedModel, work: Work) -> list[Tensor]:
    """A soft prompt `[p, d]` for each task, as wide as the model's own embeddings."""
    width = embedding_width(model)
    generator = torch.Generator().manual_seed(work.seed + work.virtual_tokens)
    rows = torch.randn(work.tasks, work.virtual_tokens, work.shape.hidden, generator=generator)
    return list((rows * width).to(torch.bfloat16))


def embedding_width(model: PreTrainedModel) -> float:
    """Standard deviation of the input embeddings' numbers."""
    return float(embedding_of(model).weight.float().std())


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """The input embeddings."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding
