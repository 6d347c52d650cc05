"""What a training run does, each setting once: bounds and meaning for the command line, HTTP and docs."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from app.sites import Site
from app.validation import StrictModel


class Method(StrEnum):
    """How a prompt is learned."""

    PROMPT = "prompt"  # embeddings before the input (Lester et al., 2021)
    P_TUNING = "p-tuning"  # the same, written by a small network (Liu et al., 2021)
    PREFIX = "prefix"  # keys and values of each layer (Li and Liang, 2021)
    MULTITASK = (
        "multitask"  # one prompt that tasks share, times a rank-one matrix of each (Wang et al., 2023)
    )
    CARTRIDGE = "cartridge"  # a document's keys and values, by self-study (Eyuboglu et al., 2025)


class Init(StrEnum):
    """What a prompt starts from."""

    TEXT = "text"  # embeddings, or keys and values, of a text
    VOCABULARY = "vocabulary"  # embeddings of random tokens
    LABELS = "labels"  # embeddings of the task's choices
    TASK = "task"  # the prompt of another task's version
    RANDOM = "random"
    ZERO = "zero"


class TrainingSettings(StrictModel, frozen=True):
    """One run. None: the method's default (`resolved`)."""

    method: Method = Field(
        Method.PREFIX,
        strict=False,
        description="prompt: embeddings before the input; p-tuning: the same, written by a network; prefix: "
        "keys and values of each layer; multitask: a prompt that tasks share; cartridge: a document's keys "
        "and values",
    )
    num_virtual_tokens: int | None = Field(
        None, ge=1, le=4096, description="Length of the prompt; default: 16, of a cartridge 128"
    )
    init: Init | None = Field(
        None,
        strict=False,
        description="What the prompt starts from; default: text, where a network writes it random",
    )
    init_text: str | None = Field(
        None, max_length=65_536, description="Text to start from; default: a general instruction"
    )
    network: Literal["none", "mlp", "lstm"] | None = Field(
        None,
        description="Network that writes the prompt, and is dropped afterwards; default: mlp for p-tuning, "
        "else none",
    )
    hidden_size: int = Field(256, ge=1, le=16_384, description="Width of that network")
    sites: tuple[Annotated[Site, Field(strict=False)], ...] | None = Field(
        None,
        strict=False,
        description="Attention of an encoder-decoder that gets a prefix; default: all that takes one",
    )
    frozen_tokens: int | None = Field(
        None,
        ge=0,
        le=4096,
        description="First tokens of a prefix that stay as they are; default: 0, of a cartridge 1",
    )

    optimizer: Literal["adamw", "adafactor"] = Field("adamw", description="Optimizer")
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Highest learning rate; default: 0.02 for a prefix, 0.003 for one that a network writes, "
        "0.005 for p-tuning and cartridges, 0.03 for embeddings, 0.3 with adafactor",
    )
    schedule: Literal["linear", "cosine", "constant"] | None = Field(
        None,
        description="How the learning rate falls after the warm-up; default: cosine, of adafactor constant",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps in which the learning rate rises")
    weight_decay: float | None = Field(
        None, ge=0, le=1, description="Weight decay; default: 0, of adafactor 0.00001"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Norm to which longer gradients are cut")
    steps: int | None = Field(
        None, ge=1, le=1_000_000, description="Optimizer steps; default: 200 to 500, by the method"
    )
    batch_size: int = Field(16, ge=1, le=4096, description="Examples of a batch")
    accumulation: int = Field(1, ge=1, le=1024, description="Batches of a step")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of forward passes; auto: bfloat16 where it is native"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of what is drawn, and of the order of the data")

    eval_every: int | None = Field(
        None, ge=1, description="Steps between two looks at the dev set; default: an eighth of all"
    )
    patience: int = Field(5, ge=1, description="Looks without improvement before the run ends")
    num_eval: int = Field(64, ge=1, description="Dev examples of each task that are answered at each look")
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Maximum number of new tokens in an answer, also when served; default: by the data's "
        "longest one",
    )

    def resolved(self, *, is_encoder_decoder: bool) -> "TrainingSettings":
        """Return the same with the defaults of its method and of the kind of base in place of None.

        The length stays None where another task's prompt gives it; `max_new_tokens` follows from the data.
        """
        found: dict[str, Any] = _DEFAULTS[self.method] | _RECIPES[self.optimizer]
        found["learning_rate"] = self._default_learning_rate()
        if self.network == "mlp" and self.method is Method.PREFIX:
            found["init"] = Init.RANDOM
        if self.init is Init.TASK:
            del found["num_virtual_tokens"]
        steps = self.steps or found["steps"]
        found["eval_every"] = max(1, steps // _LOOKS)
        return self.model_copy(
            update={name: value for name, value in found.items() if getattr(self, name) is None}
        )

    def _default_learning_rate(self) -> float:
        """Return what suits runs of a few hundred steps.

        PEFT's benchmark has 5e-3 for a prefix, in 5,000 steps; here 80 of these give a loss of 0.64, and 0.09
        at 0.02 (dates on the causal demo). LoRA's 1e-4 would hardly move a prompt.
        """
        if self.optimizer == "adafactor":
            return 0.3  # Lester et al., 2021
        if self.network == "mlp" and self.method is Method.PREFIX:
            return 3e-3
        return _LEARNING_RATES[self.method]


class SelfStudySettings(StrictModel, frozen=True):
    """What the base asks itself about a cartridge's document, and what is kept of the answers."""

    num_questions: int = Field(
        512, ge=16, le=1_000_000, description="Questions that the base is to make; equal ones count once"
    )
    chunk_tokens: int = Field(512, ge=8, description="Tokens of the document that a question is made from")
    question_temperature: float = Field(1.0, gt=0, le=4, description="Of questions; answers are greedy")
    max_question_tokens: int = Field(64, ge=1, le=4096, description="Longest question")
    max_answer_tokens: int = Field(128, ge=1, le=4096, description="Longest answer")
    top_k: int = Field(
        20,
        ge=1,
        description="The teacher's most probable tokens that are learned, at each token of an answer",
    )


_LOOKS = 8  # at the dev set, in a whole run
_RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"schedule": "cosine", "weight_decay": 0.0},
    "adafactor": {"schedule": "constant", "weight_decay": 1e-5},  # Lester et al., 2021
}
_LEARNING_RATES = {
    Method.PROMPT: 0.03,
    Method.P_TUNING: 5e-3,
    Method.PREFIX: 0.02,
    Method.MULTITASK: 0.03,
    Method.CARTRIDGE: 0.02,
}
_DEFAULTS: dict[Method, dict[str, Any]] = {
    Method.PROMPT: {"num_virtual_tokens": 16, "init": Init.TEXT, "network": "none", "steps": 400},
    Method.P_TUNING: {"num_virtual_tokens": 16, "init": Init.RANDOM, "network": "mlp", "steps": 300},
    Method.PREFIX: {"num_virtual_tokens": 16, "init": Init.TEXT, "network": "none", "steps": 200},
    Method.MULTITASK: {"num_virtual_tokens": 16, "init": Init.TEXT, "network": "none", "steps": 400},
    Method.CARTRIDGE: {
        "num_virtual_tokens": 128,
        "init": Init.TEXT,
        "network": "none",
        "frozen_tokens": 1,
        "steps": 500,
    },
}
