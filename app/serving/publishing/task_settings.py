"""The `task` part of an upload: the settings of a version, checked field by field."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from app.errors import InvalidRequest
from app.prompt import VersionDraft
from app.serving.parameters import check, parse_parameters
from app.serving.program_settings import ProgramSettings
from app.serving.publishing.program_checks import check_examples, check_program
from app.serving.publishing.training_record import TrainingRecord
from app.serving.renderings import first_template
from app.validation import Must, StrictModel

_OF_PROGRAMS = ("paraphrase", "reasoning_effort", "thinking_token_budget", "include_reasoning")  # parameters

MAX_CHOICES = 256
MAX_CHOICE_CHARS = 1024
MAX_EXAMPLES = 64
MAX_EXAMPLE_CHARS = 16_384
MAX_NOTES_CHARS = 16_384
MAX_BASE_CHARS = 512
MAX_METRICS = 64
MAX_METRIC_NAME_CHARS = 128

Label = Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_CHARS)]


class LabelledChoice(StrictModel):
    """A label with a name and the text to score for it."""

    value: Label
    text: Label


Choice = Annotated[
    Label | LabelledChoice,
    Must(f"must be a string of 1 to {MAX_CHOICE_CHARS} characters, or an object of value and text"),
]
Choices = Annotated[list[Choice], Field(max_length=MAX_CHOICES, strict=False)]  # tuples too


class Example(StrictModel):
    """Inputs, and the answer that is expected."""

    inputs: Annotated[str | dict[str, Any], Must("must be a string, or an object of strings")]
    expected: str = Field(max_length=MAX_EXAMPLE_CHARS)


class Base(StrictModel):
    """The base model that a prompt was trained on."""

    name: str = Field(max_length=MAX_BASE_CHARS)
    revision: str | None = Field(None, max_length=MAX_BASE_CHARS)


class _CompletionSettings(StrictModel):
    """A `task` part but for its program."""

    template: str | None = None
    defaults: dict[str, Any] = Field({})
    choices: Choices = Field([])
    examples: list[Example] = Field([], max_length=MAX_EXAMPLES, strict=False)
    notes: str = Field("", max_length=MAX_NOTES_CHARS)
    base: Base | None = None
    # What the trainer measured: provenance, no part of the version's identity.
    metrics: Annotated[
        dict[Annotated[str, Field(max_length=MAX_METRIC_NAME_CHARS)], int | float],
        Must(f'must be an object of at most {MAX_METRICS} numbers, such as {{"accuracy": 0.94}}'),
    ] = Field({}, max_length=MAX_METRICS)
    training: TrainingRecord | None = None  # how it was trained: provenance too

    @field_validator("defaults")
    @classmethod
    def _check_defaults(cls, defaults: dict[str, Any]) -> dict[str, Any]:
        checked = parse_parameters(defaults, where="task.defaults")
        if checked.get("do_sample") and checked.get("num_beams", 1) > 1:
            raise InvalidRequest(
                "task.defaults: beam search doesn't draw tokens; leave out do_sample or num_beams.",
                param="task.defaults.num_beams",
            )
        return {name: value for name, value in defaults.items() if value is not None}

    @field_validator("base", mode="before")
    @classmethod
    def _may_be_empty(cls, base: Any) -> Any:
        return None if base == {} else base


class _TaskSettings(ProgramSettings, _CompletionSettings):
    """A `task` part."""

    @model_validator(mode="after")
    def _agree_with_one_another(self) -> Self:
        with _naming("task"):
            rendering = check_program(self.draft, self)
            inputs = {f"examples[{index}].inputs": each.inputs for index, each in enumerate(self.examples)}
            check_examples(rendering, inputs, MAX_EXAMPLE_CHARS)
        return self

    @property
    def draft(self) -> VersionDraft:
        """The version without its prompt."""
        written = self.model_dump(exclude_none=True)
        return VersionDraft(
            prompt=None,
            template=self.template,
            defaults=self.defaults,
            choices=tuple(written["choices"]),
            examples=tuple(written["examples"]),
            notes=self.notes,
            base=written.get("base", {}),
            provenance=_provenance(self),
            program=self.model_dump(include=set(ProgramSettings.model_fields), exclude_defaults=True),
        )


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Restate InvalidRequest as a fault of a field of `place`."""
    try:
        yield
    except InvalidRequest as error:
        param = f"{place}.{error.param}"
        raise InvalidRequest(f"{param}: {error.message.rstrip('.')}.", param=param) from None


def parse_task(task: Mapping[str, Any] | None) -> VersionDraft:
    """Return a draft without a prompt. Raise InvalidRequest, which names the first field at fault."""
    given = {name: value for name, value in (task or {}).items() if value is not None}
    return check(_TaskSettings, given, "task").draft  # null is the same as none, unknown fields' too


def completion_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `task` part of one completion of a task, with all that is constant in its text.

    What makes answers of completions (reasoning, chain, vote, calibration) is left out; of a chain it is
    the first step. Raise InvalidRequest, as `parse_task`.
    """
    template = first_template(parse_task(part))
    defaults = {
        name: value for name, value in (part.get("defaults") or {}).items() if name not in _OF_PROGRAMS
    }
    kept = {name: value for name, value in part.items() if name not in ProgramSettings.model_fields}
    return kept | {"template": template, "defaults": defaults}


def _provenance(settings: _TaskSettings) -> dict[str, Any]:
    training = {} if settings.training is None else {"training": settings.training.as_json()}
    return {"metrics": settings.metrics, **training}


class _Choices(StrictModel):
    choices: Choices


def parse_choices(choices: Sequence[Any]) -> list[LabelledChoice]:
    """Check the labels of a request or of a task; one alone is its own text. Raise InvalidRequest."""
    checked = check(_Choices, {"choices": choices}, "parameters").choices
    return [LabelledChoice(value=each, text=each) if isinstance(each, str) else each for each in checked]
