"""Decisions: many questions about one input, every label of which is scored in one batch.

The labels of a question share its prompt, and all questions share what their prompts begin with: the task's
learned prompt and, where the question comes after it, the input. The versions of an ensemble decide one after
the other, and the weighted mean of their probabilities is the answer.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.concurrency import gather_or_cancel
from app.errors import InvalidRequest, NonFiniteLogits
from app.prompt import TaskVersion
from app.request import FinishReason, ProgramKind, ProgramOutcome, RequestTimings
from app.serving.admitted import Admitted
from app.serving.decisions import MAX_LABELS, DecisionRequest, Decisions, Question, Verdict
from app.serving.outcomes import failure_of
from app.serving.programs.label_scores import (
    Label,
    LabelScores,
    num_prompt_tokens,
    score_labels,
    temperature_of,
)
from app.serving.programs.question_forms import QuestionForm, form_of
from app.serving.request_builder import PreparedVersion
from app.serving.session import Session
from app.text.template import MAX_RENDERED_CHARS, Template


@dataclass(frozen=True, slots=True)
class Decide:
    """Answer all questions of a request."""

    request: DecisionRequest

    async def run(self, session: Session) -> Decisions:
        """Score the labels of all questions; a question that the model gives no answer to has none.

        Raise what the session's methods raise, and InvalidRequest for a question that can't be put so.
        """
        self._check_labels()
        session.reserve(min(self.request.num_labels, session.num_scored_at_once))
        members = await session.look_up(self.request.asked)
        begin, reason = time.monotonic(), str(FinishReason.EOS)
        try:
            found = [
                await self._decide(session, version, prepared, is_member=len(members) > 1)
                for version, prepared, _ in members
            ]
        except BaseException as error:
            reason = failure_of(error, self.request.asked.deadline)
            raise
        finally:
            seconds = time.monotonic() - begin
            session.program_ended(ProgramOutcome(kind=ProgramKind.DECISIONS, reason=reason, seconds=seconds))
        return _mean(found, [weight for _, _, weight in members])

    def _check_labels(self) -> None:
        """Refuse more than one call scores. Raise InvalidRequest."""
        num_labels = self.request.num_labels
        if num_labels > MAX_LABELS:
            raise InvalidRequest(
                f"The questions have {num_labels} options, and one call scores at most {MAX_LABELS}; send "
                "them in several calls.",
                param="questions",
            )

    def _check_text(self, template: Template) -> None:
        """Refuse more text than is read at once, before any is rendered. Raise InvalidRequest."""
        num_questions = len(self.request.questions)
        size = sum(len(message.content) for message in self.request.messages)
        size += template.num_chars(dict.fromkeys(template.fields, ""))  # worked examples and the like
        if size * num_questions > MAX_RENDERED_CHARS:
            raise InvalidRequest(
                f"{num_questions} questions about {size} characters, the task's own text included, are "
                f"{size * num_questions} to read; at most {MAX_RENDERED_CHARS} are accepted; send fewer "
                "questions at once.",
                param="questions",
            )

    async def _decide(
        self, session: Session, version: TaskVersion | None, prepared: PreparedVersion, *, is_member: bool
    ) -> Decisions:
        """Let one version decide: the one that the task means, or a member of what it means."""
        questions = self.request.questions
        self._check_text(prepared.rendering.template)
        form = form_of(
            self.request.asked,
            self.request.messages,
            version,
            prepared,
            has_chat=session.prompts.chat.exists,
            space=session.space_before_labels,
        )
        asked = [form.request(question) for question in questions]
        labels = await _label_ids(session, questions, form)
        admitted = await gather_or_cancel(
            [session.admit(each, version if is_member else None) for each in asked]
        )
        scored = await score_labels(session, admitted[0], [each.request for each in admitted], labels)
        return _decisions(questions, admitted, labels, scored)


async def _label_ids(
    session: Session, questions: Sequence[Question], form: QuestionForm
) -> list[list[Label]]:
    """Return the ids of all labels. Raise InvalidRequest where a question has one twice, or an empty one."""
    texts = [form.labels(question) for question in questions]
    all_texts = [*dict.fromkeys(text for some in texts for text in some)]
    ids = dict(zip(all_texts, await session.label_ids(all_texts, with_eos=True), strict=True))
    labels = [[ids[text] for text in some] for some in texts]
    for question, found in zip(questions, labels, strict=True):
        if len({*found}) < len(found) or not all(found):
            raise question.refused(
                "each option must have tokens of its own, but two have the same or one has none; rename them",
                question.options_field,
            )
    return labels


def _decisions(
    questions: Sequence[Question],
    admitted: Sequence[Admitted],
    labels: Sequence[Sequence[Label]],
    scored: Sequence[LabelScores | NonFiniteLogits],
) -> Decisions:
    first, prompts = admitted[0], [each.request for each in admitted]
    total = sum(len(prompt.input_ids) for prompt in prompts)
    found = [each for each in scored if isinstance(each, LabelScores)]
    temperature = temperature_of(first)
    timings = [timings for each in found for timings in each.timings]
    return Decisions(
        verdicts=tuple(_verdict(*each, temperature) for each in zip(questions, scored, strict=True)),
        version=first.version,
        prompt_tokens=total,
        shared_tokens=total - num_prompt_tokens(prompts),
        label_tokens=sum(len(label) for some in labels for label in some),
        timings=RequestTimings.longest(timings or [RequestTimings(queue=0.0, prefill=0.0, decode=0.0)]),
    )


def _verdict(question: Question, scored: LabelScores | NonFiniteLogits, temperature: float) -> Verdict:
    if isinstance(scored, NonFiniteLogits):
        return Verdict(question=question, probabilities=None)
    found = scored.probabilities(temperature)
    return Verdict(question=question, probabilities=found, label_mass=scored.mass)


def _mean(found: Sequence[Decisions], weights: Sequence[int]) -> Decisions:
    """Return what the versions decide together."""
    if len(found) == 1:
        return found[0]
    columns = zip(*(each.verdicts for each in found), strict=True)
    return replace(
        found[0],
        verdicts=tuple(_mean_verdict(verdicts, weights) for verdicts in columns),
        prompt_tokens=sum(each.prompt_tokens for each in found),
        shared_tokens=sum(each.shared_tokens for each in found),
        label_tokens=sum(each.label_tokens for each in found),
        timings=RequestTimings.longest(each.timings for each in found),
    )


def _mean_verdict(verdicts: Sequence[Verdict], weights: Sequence[int]) -> Verdict:
    """Return the weighted mean of those that have an answer."""
    said = [(each, weight) for each, weight in zip(verdicts, weights, strict=True) if each.probabilities]
    total = sum(weight for _, weight in said)
    if not total:
        return verdicts[0]
    shares = [(each.probabilities or (), each.label_mass, weight / total) for each, weight in said]
    return Verdict(
        question=verdicts[0].question,
        probabilities=[
            math.fsum(share * found[option] for found, _, share in shares)
            for option in range(len(verdicts[0].question.options))
        ],
        label_mass=math.fsum(share * mass for _, mass, share in shares),
    )
