"""Labels after prompts: how probable the model finds each of them, all scored in one batch.

Each label's ids follow a prompt's as they are. All labels of a prompt share its keys and values: they stand
on prefixes that end before the prompt's last token, and go with it. What several prompts begin with is a
prefix of its own, which is computed once: the first label is held to the session's end, so that what all
stand on stays there between steps. In an encoder-decoder the labels follow the tokens that every answer
begins with, and those of one prompt share one source.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from app.errors import NonFiniteLogits
from app.request import Request, RequestTimings, SamplingParams, Segment, TokenDelta, segments_of
from app.serving.admitted import Admitted
from app.serving.session import Session

Label = tuple[int, ...]  # ids


@dataclass(frozen=True, slots=True)
class LabelScores:
    """The labels of one prompt, and the delta of each, which has the log-probabilities of its ids."""

    labels: tuple[Label, ...]
    deltas: tuple[TokenDelta, ...]

    @property
    def totals(self) -> list[float]:
        """Return each label's log-probability."""
        return [math.fsum(score.logprob for score in delta.scores) for delta in self.deltas]

    @property
    def mass(self) -> float:
        """Return the probability that the model says any of the labels.

        One that begins with another label is a part of that one's, and doesn't count again.
        """
        totals = dict(zip(self.labels, self.totals, strict=True))
        apart = [label for label in totals if not any(label[:end] in totals for end in range(1, len(label)))]
        return min(1.0, math.fsum(math.exp(totals[label]) for label in apart))

    @property
    def timings(self) -> list[RequestTimings]:
        """Return those of all labels."""
        return [delta.timings for delta in self.deltas if delta.timings is not None]

    def probabilities(self, temperature: float, *, length_normalized: bool = False) -> list[float] | None:
        """Return the labels' probabilities, which sum to 1; None: the model gives none of them a chance.

        The log-probabilities, or their means over a label's tokens, are divided by the temperature first.
        """
        sizes = [len(label) if length_normalized else 1 for label in self.labels]
        levels = [total / size / temperature for total, size in zip(self.totals, sizes, strict=True)]
        highest = max(levels)
        if math.isinf(highest):
            return None
        weights = [math.exp(level - highest) for level in levels]
        return [weight / math.fsum(weights) for weight in weights]


async def score_labels(
    session: Session, admitted: Admitted, prompts: Sequence[Request], labels: Sequence[Sequence[Label]]
) -> list[LabelScores | NonFiniteLogits]:
    """Score the labels of each prompt; they count as one request, the admitted one.

    Where the logits of a prompt's labels are not finite, the error stands in its place. Raise what
    `Session.score` raises.
    """
    shared = Segment(token_ids=common_prefix(prompts), is_kept=False)
    requests = [
        request
        for prompt, some in zip(prompts, labels, strict=True)
        for request in _label_requests(prompt, some, shared)
    ]
    if len(requests) > 1:
        requests[0] = replace(requests[0], is_held=True)
    scored = iter(await session.score(admitted, requests, num_prompt_tokens(prompts)))
    return [_scores_of(tuple(each), [next(scored) for _ in each]) for each in labels]


def temperature_of(admitted: Admitted) -> float:
    """Return what the version's calibration divides log-probabilities by."""
    calibration = admitted.program.calibration
    return 1.0 if calibration is None else calibration.temperature


def num_prompt_tokens(prompts: Sequence[Request]) -> int:
    """Return how many ids all prompts have, where what they begin with in common counts once."""
    again = 0
    if _have_one_beginning(prompts):
        again = sum(len(segment.token_ids) for segment in prompts[0].segments) + len(common_prefix(prompts))
    return sum(len(prompt.input_ids) for prompt in prompts) - again * (len(prompts) - 1)


def common_prefix(prompts: Sequence[Request]) -> tuple[int, ...]:
    """Return the ids that all prompts have after their segments; the last id of each stays its own."""
    if not _have_one_beginning(prompts):
        return ()
    common, *others = (each.token_ids[:-1] for each in prompts)
    for ids in others:
        if ids[: len(common)] != common:  # which is much faster than the search, and seldom so
            pairs = zip(common, ids, strict=False)
            common = tuple(own for own, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return common


def _have_one_beginning(prompts: Sequence[Request]) -> bool:
    """Return whether what they begin with has the same keys and values; a source of their own changes all."""
    first, *others = prompts
    return all(each.source == first.source and each.segments == first.segments for each in others)


def _label_requests(prompt: Request, labels: Sequence[Label], shared: Segment) -> list[Request]:
    """Return a request for each label; the prompt's last token gives the score of the label's first one."""
    own, last = prompt.token_ids[shared.num_slots : -1], prompt.token_ids[-1]
    segments = segments_of(
        *prompt.segments,
        shared,
        Segment(token_ids=own, is_kept=False),
    )
    return [
        replace(
            prompt,
            id=f"{prompt.id}-label-{number}",
            segments=segments,
            token_ids=(last, *label),
            num_scored=len(label),
            num_top=0,
            max_new_tokens=0,
            sampling=SamplingParams(),
            grammar=None,
            stop_ids=frozenset(),
        )
        for number, label in enumerate(labels)
    ]


def _scores_of(
    labels: tuple[Label, ...], found: Sequence[TokenDelta | NonFiniteLogits]
) -> LabelScores | NonFiniteLogits:
    error = next((each for each in found if isinstance(each, NonFiniteLogits)), None)
    return error or LabelScores(labels, tuple(each for each in found if isinstance(each, TokenDelta)))
