"""What comes of a token that was chosen: the output of its request, and whether the request ends with it."""

import math
from collections.abc import Iterable

from app.engine.router import Output
from app.engine.sampling.inputs import SampledToken
from app.engine.sequence import Sequence
from app.engine.step import StepCounts
from app.errors import NonFiniteLogits, PromptplexError
from app.request import FinishReason, TokenDelta, TokenScore


def accept(
    sequence: Sequence, token: SampledToken, error: PromptplexError | None, counts: StepCounts, now: float
) -> Output:
    """Take a row's next token, unless there is an `error`; return what its caller gets."""
    scores = () if sequence.num_generated else tuple(sequence.scores)
    if not token.is_finite or (scores and has_nan(scores)):
        return not_finite()
    if error is not None:
        return error
    if sequence.request.max_new_tokens == 0:
        return end_scored(sequence, token.top, now)
    reason = sequence.accept(token.token_id, now)
    is_first = sequence.num_generated == 1
    (counts.first_token_latencies if is_first else counts.inter_token_latencies).append(sequence.latency)
    if reason is None:
        return TokenDelta(token.token_id, token.logprob, token.top, scores)
    return TokenDelta(
        token.token_id, token.logprob, token.top, scores, finish=reason, timings=sequence.timings(now)
    )


def end_scored(sequence: Sequence, top: tuple[tuple[int, float], ...], now: float) -> Output:
    """End what generates nothing; `top` are the most probable tokens after its prompt, if wanted."""
    if has_nan(sequence.scores):
        return not_finite()
    scores, timings = tuple(sequence.scores), sequence.timings(now)
    return TokenDelta(top=top, scores=scores, finish=FinishReason.LENGTH, timings=timings)


def not_finite() -> NonFiniteLogits:
    """Return the error of a row without numbers."""
    return NonFiniteLogits(
        "the model produced NaN or infinite logits for this request; if it names a task, the task's "
        "prompt is the likely cause: check its values, or roll the task back"
    )


def has_nan(scores: Iterable[TokenScore]) -> bool:
    """Return whether the model gave no number for some of a row's scores."""
    return any(math.isnan(score.logprob) for score in scores)
