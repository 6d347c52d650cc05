"""Self-study: the base asks itself about a document, answers with it in context, and a cartridge learns that.

The document in context is the teacher; what learns is a prefix that starts from the document's own keys and
values and is much shorter (Eyuboglu et al., 2025). Questions and answers take the place of a file's examples.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from app.errors import InvalidRequest
from app.text.template import parse_template
from app.training.base import TrainingBase
from app.training.continuing import Context
from app.training.distillation import TaughtExample, taught
from app.training.document import Document, text_prefix
from app.training.encoding import source_of
from app.training.examples import Dataset, EncodedExample, Example
from app.training.prompted_model import PromptedModel
from app.training.questions import Asked, made_questions
from app.training.settings import SelfStudySettings
from app.training.splits import by_input, plain_text, split_by_hash

_TOGETHER = 16  # questions that are answered together
_FEWEST = 10  # questions with an answer, of which some are held out


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Questions with the teacher's answers, and the teacher's distribution at each token of an answer."""

    dataset: Dataset
    train: tuple[TaughtExample, ...]  # in the order of the dataset's
    dev: tuple[TaughtExample, ...]
    document: Document


def study(
    base: TrainingBase,
    document: Document,
    template: str | None,
    settings: SelfStudySettings,
    *,
    num_virtual_tokens: int,
    seed: int = 0,
    questions: Sequence[Asked] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Study:
    """Ask, answer, and keep what the teacher says; `questions` None: the base makes them itself.

    The teacher reads the whole document where the base has positions for it, a question and an answer;
    otherwise the part that the question was made from. It answers greedily, as serving does.

    Raise InvalidRequest: the template leaves no place for made questions, or too few have an answer.
    """
    parsed = parse_template(template)
    if questions is None:
        progress(f"making {settings.num_questions} questions about {len(document.ids)} tokens")
        questions = list(made_questions(base, document, parsed, settings, seed))
    teacher = _Teacher(base, document, settings)
    limit = base.geometry.max_positions - num_virtual_tokens - settings.max_answer_tokens
    asked = [_Read(each, source_of(each.example, base, parsed)) for each in questions]
    progress(f"answering {len(asked)} questions with the document in context")
    answered = list(teacher.answers([each for each in asked if len(each.source) <= limit]))
    if len(answered) < _FEWEST:
        raise InvalidRequest(
            f"only {len(answered)} of {len(asked)} different questions have an answer, expected at least "
            f"{_FEWEST}; make more of them, let answers be longer, or give better ones in a file",
            param="questions",
        )
    lessons = {plain_text(example): lesson for example, lesson in answered}
    splits = split_by_hash(by_input(example for example, _ in answered), split_seed=seed)
    return Study(
        dataset=Dataset(train=splits.train, dev=splits.dev, test=splits.test, digest=document.digest),
        train=tuple(lessons[plain_text(example)] for example in splits.train),
        dev=tuple(lessons[plain_text(example)] for example in splits.dev),
        document=document,
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """A question with its ids, as serving has them."""

    asked: Asked
    source: tuple[int, ...]


class _Teacher:
    """The base with the document in context."""

    def __init__(self, base: TrainingBase, document: Document, settings: SelfStudySettings) -> None:
        self._base, self._document, self._settings = base, document, settings

    def answers(self, questions: Sequence[_Read]) -> Iterator[tuple[Example, TaughtExample]]:
        """Yield the questions that have an answer, each with it; in the order of what must be read."""
        groups = defaultdict(list)
        for question in questions:
            groups[self._to_read(question)].append(question)
        for ids, group in groups.items():
            context, model = Context(self._base, ids), PromptedModel(self._base, text_prefix(self._base, ids))
            for first in range(0, len(group), _TOGETHER):
                batch = group[first : first + _TOGETHER]
                yield from self._answered(context, model, batch)

    def _to_read(self, question: _Read) -> tuple[int, ...]:
        """Return the ids of the whole document, or of a part. Raise InvalidRequest: there is no part."""
        needed = len(self._document.ids) + len(question.source) + self._settings.max_answer_tokens
        if needed <= self._base.geometry.max_positions:
            return self._document.ids
        if question.asked.part is None:
            raise InvalidRequest(
                f"the document, a question and its answer take up to {needed} tokens, but the base has "
                f"{self._base.geometry.max_positions} positions: questions of a file need all of it. Shorten "
                "it, or let the base make the questions, from parts of it",
                param="questions",
            )
        return self._document.ids_of(question.asked.part)

    @torch.no_grad()
    def _answered(
        self, context: Context, model: PromptedModel, questions: Sequence[_Read]
    ) -> Iterator[tuple[Example, TaughtExample]]:
        sources = [self._document.without_beginning(question.source) for question in questions]
        written = context.continued(sources, max_new_tokens=self._settings.max_answer_tokens)
        read = [
            EncodedExample(source, tuple(target)) for source, target in zip(sources, written, strict=True)
        ]
        logits = model.logits(read).split([len(target) for target in written])  # type: ignore[no-untyped-call]
        for question, target, rows in zip(questions, written, logits, strict=True):
            text = self._base.encoder.tokenizer.text_of(target)
            if text.strip():
                example = EncodedExample(question.source, tuple(target))
                yield (
                    replace(question.asked.example, output=text),
                    taught(example, rows, self._settings.top_k),
                )
