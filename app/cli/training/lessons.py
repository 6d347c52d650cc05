"""What a run learns from: a file's examples, or what the base says with a document in context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.cli.training.options import TrainOptions
from app.prompt import Prompt
from app.serving.publishing.task_settings import LabelledChoice
from app.training.base import TrainingBase
from app.training.dev_set import Objective
from app.training.distillation import Distillation
from app.training.document import new_cartridge, read_document
from app.training.encoding import Learned, encode_examples
from app.training.examples import Dataset, EncodedExample
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
    settings: TrainingSettings,
    base: TrainingBase,
    dataset: Dataset,
    *,
    template: str | None,
    choices: Sequence[LabelledChoice],
    start: Prompt | None,
) -> Lessons:
    """Return a file's lessons. Raise InvalidRequest: an example doesn't fit the template or the base."""
    learned = new_prompt(settings, base, choices=[choice.value for choice in choices], start=start)
    answers = [base.encoder.answer_ids(choice.text, base.eos_id) for choice in choices]
    # Serving scores a choice like a prompt, and generates a token behind it.
    positions = Learned.of(as_prompt(learned), max(map(len, answers)) + 1 if answers else 0)
    # The test examples are measured when the prompt is trained, and must fit too.
    train, dev, _ = (
        encode_examples(each, base, template, positions)
        for each in (dataset.train, dataset.dev, dataset.test)
    )
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
    template: str | None,
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
        template,
        options.self_study,
        num_virtual_tokens=length,
        seed=settings.seed,
        questions=questions,
        progress=say,
    )
