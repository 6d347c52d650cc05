"""What a version's manifest says beyond one completion: reasoning, chain, vote, calibration, instructions.

Checked once with the upload, and read back as the same models at admission. In a `task` part and in the
answers about tasks they are fields of their own; a manifest has them as its `program`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError

from app.errors import CorruptData
from app.text.template import MAX_TEMPLATE_CHARS
from app.validation import Must, StrictModel

MAX_MARKER_CHARS = 256
MAX_STEPS = 64
MAX_BALLOTS = 64
MAX_PARAPHRASES = 64
MAX_SHOTS = 64
MAX_SHOT_CHARS = 16_384
MAX_TOKENS = 1_000_000

Marker = Annotated[str, Field(min_length=1, max_length=MAX_MARKER_CHARS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Budget = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TemplateText = Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)]


class ReasoningSettings(StrictModel):
    """How the steps of an output are separated from the answer after them."""

    answer_after: Marker  # the answer begins behind it
    steps_end: Marker | None = None  # what a step ends with; None: the steps are one text
    effort: dict[Effort, Budget] = Field({})  # tokens before the marker is forced, by effort

    @property
    def has_budgets(self) -> bool:
        """Return whether there is a budget for any effort but none at all, which needs none."""
        return bool(self.effort.keys() - {"none"})


class ChainStep(StrictModel):
    """A step of a chain that another task makes, on the same base."""

    task: Annotated[str, Field(min_length=1, max_length=512)]


class ChainSettings(StrictModel):
    """Steps, each of which reads what the ones before it wrote.

    The template has the task's fields and `{so_far}`, all steps with their ends, or it has `{last}`, which is
    the request's input at first and then the step before.
    """

    template: TemplateText
    step_ends: Marker | None = None  # None: a step ends where the model ends it
    done: Marker | None = None  # the answer is what a step has behind it; None: the last step is the answer
    max_steps: int = Field(8, ge=1, le=MAX_STEPS)
    max_step_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    steps: list[ChainStep] = Field([], max_length=MAX_STEPS, strict=False)  # of other tasks; the last goes on


class VoteSettings(StrictModel):
    """Self-consistency (Wang et al. 2022): n samples, of which the most frequent answer wins."""

    n: int = Field(ge=2, le=MAX_BALLOTS)
    by: Literal["answer"] = "answer"


class CalibrationSettings(StrictModel):
    """Divides the log-probabilities of labels before they are compared."""

    temperature: float = Field(ge=0.001, le=1000)  # less would make infinities of them


class Shot(StrictModel):
    """An example that is shown to the model before each input."""

    inputs: Annotated[str | dict[str, Any], Must("must be a string, or an object of strings")]
    output: str = Field(max_length=MAX_SHOT_CHARS)


class ProgramSettings(StrictModel):
    """All of it; absent fields are those of a plain task."""

    model_config = ConfigDict(frozen=True)

    reasoning: ReasoningSettings | None = None
    chain: ChainSettings | None = None
    vote: VoteSettings | None = None
    calibration: CalibrationSettings | None = None
    paraphrases: list[TemplateText] = Field([], max_length=MAX_PARAPHRASES, strict=False)
    few_shot: list[Shot] = Field([], max_length=MAX_SHOTS, strict=False)

    @property
    def num_ballots(self) -> int:
        """Return how many samples an answer takes."""
        return 1 if self.vote is None else self.vote.n

    @property
    def step_tasks(self) -> list[str]:
        """Return references of the tasks that steps name, which its users and its author must reach."""
        return [] if self.chain is None else [step.task for step in self.chain.steps]

    @classmethod
    def of(cls, program: Mapping[str, Any]) -> Self:
        """Read a manifest's `program` back. Raise CorruptData where it is none."""
        try:
            return cls.model_validate(dict(program))
        except ValidationError:
            raise CorruptData("A version's program is damaged, or of a later server") from None


PLAIN_PROGRAM = ProgramSettings()
