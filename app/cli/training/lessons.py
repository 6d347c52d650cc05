"""What a run learns from: a file's examples, or what the base says with a document in context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from app.cli.training.options import TrainOptions, task_settings
from app.cli.training.tasks import TaskInTraining
from app.prompt import Prompt
from app.serving.publishing.task_settings import completion_part
from app.training.base import TrainingBase
from app.training.dev_set import Objective
from app.training.distillation import Distillation
from app.training.document import new_cartridge, read_document
from app.training.examples import EncodedExample, Example
from app.training.prompted_model import PromptedModel
from app.training.prompts import LearnedPrompt, as_prompt, new_prompt
from app.training.questions import read_questions
from app.training.self_study import Study, study
from app.training.settings import TrainingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """A prompt before its first step, and what it learns."""

    learned: LearnedPrompt
    train: Sequence[EncodedExample]
    dev: Sequence[EncodedExample]
    objective: Objective | None = None  # None: the likelihood of the targets


def lessons_of_examples(
    settings: TrainingSettings, base: TrainingBase, tasks: Sequence[TaskInTraining], *, start: Prompt | None
) -> Lessons:
    """Return the lessons of the tasks' data. Raise InvalidRequest: an example doesn't fit the base."""
    labels = tuple(dict.fromkeys(label for task in tasks for label in task.labels))
    learned = new_prompt(settings, base, choices=labels, start=start, num_tasks=len(tasks))
    prompt = as_prompt(learned)

    def encoded(number: int, examples: Sequence[Example]) -> list[EncodedExample]:
        found = tasks[number].encoded(examples, base, prompt)
        return [replace(each, task=number) for each in found]

    train, dev = list[EncodedExample](), list[EncodedExample]()
    for number, task in enumerate(tasks):
        train += encoded(number, task.dataset.train)
        dev += encoded(number, task.dataset.dev)
        encoded(number, task.dataset.test)  # measured when the prompt is trained, so it must fit too
    return Lessons(learned=learned, train=train, dev=dev)


def lessons_of_study(settings: TrainingSettings, base: TrainingBase, studied: Study) -> Lessons:
    """Return a document's lessons. Raise InvalidRequest: it has no room for so many virtual tokens."""
    cartridge = new_cartridge(settings, base, studied.document)
    objective = Distillation(PromptedModel(base, cartridge))
    return Lessons(learned=cartridge, train=studied.train, dev=studied.dev, objective=objective)


def study_document(
    options: TrainOptions,
    settings: TrainingSettings,
    base: TrainingBase,
    say: Callable[[str], None],
) -> Study | None:
    """Let the base study the document; None: the options name none.

    Raise InvalidRequest: the document, the file of questions or the template is no good for that.
    """
    if options.document is None:
        return None
    questions = None if options.questions is None else read_questions(options.questions)
    document = read_document(options.document, base)
    new_cartridge(settings, base, document)  # refuses what can't be, before anything takes time
    length = settings.resolved(is_encoder_decoder=False).num_virtual_tokens
    assert length is not None
    return study(
        base,
        document,
        completion_part(task_settings(options))["template"],
        options.self_study,
        num_virtual_tokens=length,
        seed=settings.seed,
        questions=questions,
        progress=say,
    )
