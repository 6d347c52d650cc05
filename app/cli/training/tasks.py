"""The tasks of a run: the data of each, and the task part that its prompt is trained for."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.cli.training.answerer import LocalServer, TaskAnswerer
from app.cli.training.options import TrainOptions, instruction_template, task_settings
from app.cli.training.task_part import (
    Part,
    Say,
    longest_answer,
    scored_choices,
    with_choices,
    with_limit,
    with_template,
)
from app.errors import InvalidRequest
from app.prompt import Prompt
from app.serving.publishing.task_settings import LabelledChoice, completion_part
from app.training.base import TrainingBase
from app.training.data_files import refused
from app.training.encoding import Learned, encode_examples
from app.training.examples import Dataset, EncodedExample, Example
from app.training.report.contents import Split

_SPARE = 1.25  # times the longest answer of the data may be generated


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInTraining:
    """One of the tasks that learn in a run."""

    name: str
    folder: Path  # of its results, in the run's directory
    files: Sequence[Path]
    dataset: Dataset
    part: Part  # that is trained for
    choices: Sequence[LabelledChoice]  # the task's, if every line expects one of them
    server: LocalServer
    is_alone: bool

    @property
    def template(self) -> str | None:
        """Return the template of what the prompt is trained on, with all that is constant in it."""
        template: str | None = completion_part(self.part)["template"]
        return template

    @property
    def labels(self) -> list[str]:
        """Return the names of the choices."""
        return [choice.value for choice in self.choices]

    @property
    def measured_on(self) -> Split:
        """Return the split on which the result is measured: test, or what is there in its place."""
        return "test" if self.dataset.test else "dev" if self.dataset.dev else "train"

    def answerer(self, template: str | None = None) -> TaskAnswerer:
        """Return what completes with the task's settings, or with another template."""
        part = completion_part(self.part)
        return TaskAnswerer(self.server, part if template is None else {**part, "template": template})

    def encoded(
        self, examples: Sequence[Example], base: TrainingBase, prompt: Prompt
    ) -> list[EncodedExample]:
        """Return the ids. Raise InvalidRequest: one doesn't fit the template, or the base with the prompt."""
        answers = [base.encoder.answer_ids(choice.text, base.eos_id) for choice in self.choices]
        # Serving scores a choice like a prompt, and generates a token behind it.
        learned = Learned.of(prompt, max(map(len, answers)) + 1 if answers else 0)
        with _naming(self.name, is_alone=self.is_alone):
            return encode_examples(examples, base, self.template, learned)


def tasks_of_data(
    options: TrainOptions,
    datasets: Mapping[str, Dataset],
    base: TrainingBase,
    server: LocalServer,
    *,
    wanted: int | None,
    say: Say,
) -> tuple[TaskInTraining, ...]:
    """Return the task of each dataset; what the options leave out follows from it.

    `wanted` is the number of new tokens; None: there is room for the longest answer. Raise InvalidRequest: a
    template doesn't take a line, or the base has no room for it.
    """
    found = []
    for name, dataset in datasets.items():
        given, said = task_settings(options), _said_of(name, say, is_alone=len(datasets) == 1)
        with _naming(name, is_alone=len(datasets) == 1):
            given = with_template(with_choices(given, dataset), dataset, base, said)
            template = completion_part(given)["template"]
            longest = longest_answer(dataset, base, template)
            if options.instruction is not None:
                longest_answer(dataset, base, instruction_template(options.instruction, template))
        part = with_limit(given, longest, spare=_SPARE, wanted=wanted, say=said)
        found.append(_task(options, name, dataset, part, server, said))
    return tuple(found)


def task_of_study(
    options: TrainOptions, dataset: Dataset, server: LocalServer, *, wanted: int | None, say: Say
) -> TaskInTraining:
    """Return the one task of a document, of which the dataset came."""
    [name] = options.data
    given, longest = with_choices(task_settings(options), dataset), options.self_study.max_answer_tokens
    part = with_limit(given, longest, spare=1.0, wanted=wanted, say=say)
    return _task(options, name, dataset, part, server, say)


def _task(
    options: TrainOptions, name: str, dataset: Dataset, part: Part, server: LocalServer, say: Say
) -> TaskInTraining:
    return TaskInTraining(
        name=name,
        folder=options.folder(name),
        files=options.files(name),
        dataset=dataset,
        part=part,
        choices=scored_choices(part, dataset, say),
        server=server,
        is_alone=len(options.data) == 1,
    )


def _said_of(name: str, say: Say, *, is_alone: bool) -> Say:
    return say if is_alone else lambda line: say(f"{name}: {line}")


@contextlib.contextmanager
def _naming(name: str, *, is_alone: bool) -> Iterator[None]:
    """Name the task in what is refused, where there are several."""
    try:
        yield
    except InvalidRequest as error:
        if is_alone:
            raise
        raise refused(name, error.message) from None
