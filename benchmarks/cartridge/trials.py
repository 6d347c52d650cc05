"""What is compared: a document of 2,000 tokens in context, and cartridges of it, on held-out questions."""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from app.cli.training.answerer import LocalServer, TaskAnswerer
from app.cli.training.in_context import InContext
from app.prompt import ModelGeometry, Prompt
from app.training.base import TrainingBase
from app.training.dev_set import DevSet, DevTask
from app.training.distillation import Distillation
from app.training.document import Document, new_cartridge
from app.training.examples import Example
from app.training.loop import Trainer
from app.training.prompted_model import PromptedModel
from app.training.prompts import as_prompt
from app.training.run import DevRecord, History, StepRecord
from app.training.self_study import Study, study
from app.training.settings import Method, SelfStudySettings, TrainingSettings
from benchmarks.cartridge.registers import TEMPLATE, WORDINGS, document_of, make_register

_FACTS = 285  # of seven tokens each
_NEW_TOKENS = 4
_TASK = {"template": TEMPLATE, "defaults": {"max_new_tokens": _NEW_TOKENS}}


@dataclass(frozen=True, slots=True)
class Questions:
    """Held-out questions in words that self-study didn't use for them, so many of each kind."""

    asked: Sequence[Example]  # about lines that it asked about in other words
    unasked: Sequence[Example]  # about lines that it never came to
    share_asked: float  # of the document's lines

    @property
    def all(self) -> list[Example]:
        """Return both kinds, the asked ones first."""
        return [*self.asked, *self.unasked]

    def shares(self, are_right: Sequence[bool]) -> dict[str, float]:
        """Return the share that is right, of each kind and of the document's lines."""
        count = len(self.asked)
        kinds = {"asked": _mean(are_right[:count]), "unasked": _mean(are_right[count:])}
        of_lines = self.share_asked * kinds["asked"] + (1 - self.share_asked) * kinds["unasked"]
        return {"of_lines": round(of_lines, 4)} | kinds


class Trial:
    """One document over one base, with what self-study made of it."""

    def __init__(self, base: TrainingBase, server: LocalServer, seed: int, num_questions: int) -> None:
        self._base, self._server = base, server
        self.facts = make_register(random.Random(seed), _FACTS)
        self.document = Document(document_of(self.facts), base.encoder.tokenizer)
        self._in_context = InContext(
            server=server,
            base=base,
            document=self.document,
            template=TEMPLATE,
            max_new_tokens=_NEW_TOKENS,
        )
        settings = SelfStudySettings(
            num_questions=num_questions,
            chunk_tokens=280,
            max_question_tokens=24,
            max_answer_tokens=_NEW_TOKENS,
        )
        began = time.perf_counter()
        self.study: Study = study(
            base, self.document, TEMPLATE, settings, num_virtual_tokens=0, seed=seed, progress=print
        )
        self.study_seconds = time.perf_counter() - began

    @property
    def geometry(self) -> ModelGeometry:
        """Return the base's shape."""
        return self._base.geometry

    def held_out(self, number: int, seed: int) -> Questions:
        """Return so many questions of each kind, or all."""
        rng, data = random.Random(seed), self.study.dataset
        used = {each.inputs for split in (data.train, data.dev, data.test) for each in split}
        trained = {each.inputs for each in data.train}
        kinds: dict[bool, list[Example]] = {True: [], False: []}
        num_asked = 0
        for fact in self.facts:
            wordings = [fact.question(wording) for wording in WORDINGS]
            is_asked = any(question in trained for question in wordings)
            new = [question for question in wordings if question not in used]
            kinds[is_asked] += [Example(inputs=question, output=fact.person) for question in new]
            num_asked += is_asked
        asked, unasked = (rng.sample(kinds[kind], min(number, len(kinds[kind]))) for kind in (True, False))
        return Questions(asked, unasked, round(num_asked / len(self.facts), 4))

    def train(
        self, num_virtual_tokens: int, steps: int, learning_rate: float
    ) -> tuple[Prompt, Prompt, float]:
        """Return the cartridge before and after training, and the seconds that training took."""
        settings = TrainingSettings(
            method=Method.CARTRIDGE,
            num_virtual_tokens=num_virtual_tokens,
            learning_rate=learning_rate,
            steps=steps,
            batch_size=32,
            precision="float32",
        )
        learned = new_cartridge(settings, self._base, self.document)
        start, began = as_prompt(learned), time.perf_counter()
        trainer = Trainer(
            base=self._base,
            learned=learned,
            settings=settings,
            train=self.study.train,
            dev=DevSet(
                encoded=self.study.dev,
                examples=self.study.dataset.dev,
                tasks=[DevTask(TaskAnswerer(self._server, _TASK))],
            ),
            listener=_Silent(),
            objective=Distillation(PromptedModel(self._base, learned)),
        )
        return start, trainer.run().prompt, time.perf_counter() - began

    def answers(self, prompt: Prompt | None, questions: Sequence[Example]) -> list[str]:
        """Return answers with a cartridge before the question, or with neither it nor the document."""
        return TaskAnswerer(self._server, _TASK).answers(prompt, questions)

    def answers_in_context(self, questions: Sequence[Example]) -> list[str]:
        """Return answers with the document before each question."""
        return self._in_context.answers(None, questions)

    def first_token(self, prompt: Prompt, questions: Sequence[Example]) -> dict[str, float]:
        """Return seconds to the first token, and the ratio."""
        version = self._server.publish(_TASK, prompt)
        found = self._in_context.first_token(version, questions)
        return {name: round(value, 4) for name, value in asdict(found).items()}


def right(answers: Sequence[str], questions: Sequence[Example]) -> list[bool]:
    """Return whether each answer is right."""
    return [answer.strip() == question.output for answer, question in zip(answers, questions, strict=True)]


def _mean(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


class _Silent:
    """A listener that does nothing."""

    def on_start(self, history: History) -> None: ...
    def on_step(self, record: StepRecord) -> None: ...
    def on_dev(self, record: DevRecord) -> None: ...
    def on_advice(self, line: str) -> None:
        print(line)
