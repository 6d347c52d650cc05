"""What every side does: random weights of a given shape, random prompts, random requests.

Shapes of tensors: p virtual tokens, d hidden size.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder of the Llama kind. Head width is `hidden / heads`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    architecture: str = "qwen2"
    has_tied_embeddings: bool = True

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in bf16: kappa of docs/benchmarks.md."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * 2


SHAPES = {
    "qwen2-0.4b": Shape(layers=24, hidden=896, heads=14, kv_heads=2, intermediate=4864, vocabulary=32_000),
    "qwen2-1.5b": Shape(layers=28, hidden=1536, heads=12, kv_heads=2, intermediate=8960, vocabulary=151_936),
    "tiny": Shape(layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=256),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Requests of equal length, without EOS, all there at once."""

    shape: Shape
    name: str = "work"
    tasks: int = 8
    requests: int = 32
    virtual_tokens: int = 20  # p of every task's soft prompt; 0: no prompts
    prompt_tokens: int = 64
    new_tokens: int = 32
    sampling: tuple[tuple[str, float], ...] = ()  # such as ("top_p", 0.9); none: greedy
    num_labels: int = 0  # of one token each, between which a request chooses; 0: it generates
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.tasks, self.requests, self.prompt_tokens, self.new_tokens) < 1 or self.virtual_tokens < 0:
            raise ValueError("tasks, requests and tokens must be at least 1, virtual tokens at least 0")
        if self.tasks > self.requests:
            raise ValueError(f"{self.requests} requests can't have {self.tasks} tasks")
        if self.num_labels and self.new_tokens > 1:
            raise ValueError(f"a choice is one token, not {self.new_tokens}")

    @property
    def labels(self) -> range:
        """Ids of the labels."""
        return range(3, 3 + self.num_labels)

    @property
    def rows(self) -> int:
        """Sequences that run at once."""
        return self.requests * max(1, self.num_labels)

    @property
    def slots(self) -> int:
        """Slots of the K/V cache that all requests take, without their tasks' prompts."""
        return self.rows * (self.prompt_tokens + self.new_tokens)

    @property
    def unit(self) -> str:
        """What is counted: where an answer is one token, the rate of answers."""
        return "tokens/s" if self.new_tokens > 1 else "requests/s"

    @property
    def description(self) -> str:
        """What is asked, in a phrase."""
        requests = f"{self.requests} request{'s' if self.requests > 1 else ''}"
        parts = [f"{requests} of {self.prompt_tokens}", f"p={self.virtual_tokens}", self._answers]
        parts += [] if self.tasks == min(8, self.requests) else [f"{self.tasks} task"]
        return ", ".join(parts + [f"{name} {value}" for name, value in self.sampling])

    @property
    def _answers(self) -> str:
        return f"{self.num_labels} labels" if self.num_labels else f"{self.new_tokens} new"


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
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.float32)
    nn.Module.to(model, torch.bfloat16)  # not the model's own `to`, whose annotations mislead mypy
    model.train(False).requires_grad_(False)
    return model


def config_of(shape: Shape) -> PreTrainedConfig:
    """What transformers builds the model from."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape.has_tied_embeddings,
    }
    return CONFIG_MAPPING[shape.architecture](**sizes)


def random_prompts(model: PreTrainedModel, work: Work) -> list[Tensor]:
    """A soft prompt `[p, d]` for each task, as wide as the model's own embeddings."""
    return prompts_of_width(embedding_width(model), work)


def prompts_of_width(width: float, work: Work) -> list[Tensor]:
    """A soft prompt `[p, d]` for each task, of numbers with this standard deviation."""
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
