"""Answers of `/generate` in the shapes of TGI and LoRAX: whole ones, and the events of streams."""

import math
from collections.abc import Sequence

from app.api.schemas.answers import (
    BallotAnswer,
    ChoiceAnswer,
    Details,
    GenerateResponse,
    ReasoningAnswer,
    Sample,
    StreamDetails,
    StreamEvent,
    Token,
    VoteAnswer,
)
from app.api.sse import data_event, json_bytes
from app.serving.generation_request import (
    Ballot,
    Classification,
    GenerationResult,
    OutputToken,
    TextDelta,
    Vote,
)


def generate_answer(results: Sequence[GenerationResult], *, with_details: bool) -> GenerateResponse:
    """Return the answer to a request; of several results all are in `samples`."""
    best = results[0]
    version = best.version
    answer: GenerateResponse = {
        "generated_text": best.generated_text,
        "task_id": None if version is None else version.task_id,
        "task_version": None if version is None else version.version,
        "version_digest": None if version is None else f"sha256:{version.digest}",
    }
    if (before := _reasoning(best)) is not None:
        answer["reasoning"] = before
    if best.score is not None:
        answer["score"] = best.score
    if with_details:
        answer["details"] = _details(best)
    if best.classification is not None:
        answer["choice"] = _choice(best.text, best.classification)
    if best.vote is not None:
        answer["vote"] = vote_answer(best.text, best.vote)
    if len(results) > 1:
        answer["samples"] = [_sample(result, with_details) for result in results]
    return answer


def _sample(result: GenerationResult, with_details: bool) -> Sample:
    sample: Sample = {"generated_text": result.generated_text}
    if (before := _reasoning(result)) is not None:
        sample["reasoning"] = before
    if result.score is not None:
        sample["score"] = result.score
    if with_details:
        sample["details"] = _details(result)
    return sample


def _reasoning(result: GenerationResult) -> ReasoningAnswer | None:
    found = result.reasoning
    if found is None or not found.is_shown:
        return None
    return {"text": found.text, "steps": list(found.steps), "tokens": found.num_tokens}


def _choice(best: str, classification: Classification) -> ChoiceAnswer:
    return {
        "value": best,
        "confidence": classification.confidence,
        "label_mass": classification.label_mass,
        "probabilities": [
            {"value": value, "probability": probability}
            for value, probability in classification.probabilities
        ],
    }


def vote_answer(winner: str, vote: Vote) -> VoteAnswer:
    """Return how the answers to a request were voted on."""
    return {
        "winner": winner,
        "share": vote.share,
        "ballots": [ballot_answer(ballot) for ballot in vote.ballots],
    }


def ballot_answer(ballot: Ballot) -> BallotAnswer:
    """Return one of the answers that were voted on."""
    result = ballot.result
    answer: BallotAnswer = {
        "index": ballot.index,
        "answer": result.text,
        "weight": ballot.weight,
        "finish_reason": result.finish.value,
        "generated_tokens": result.num_generated,
        "version": None if result.version is None else result.version.version,
    }
    if (before := _reasoning(result)) is not None:
        answer["reasoning"] = before
    if result.vote is not None:
        answer["share"] = result.vote.share
    return answer


def _details(result: GenerationResult) -> Details:
    before = result.reasoning
    tokens = result.tokens if before is None or before.is_shown else result.tokens[before.num_tokens :]
    details: Details = {
        "finish_reason": result.finish.value,
        "generated_tokens": len(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "virtual_tokens": result.virtual_tokens,
        "seed": result.seed,
        "prefill": [
            {
                "id": token.id,
                "text": token.text,
                "logprob": None if math.isnan(token.logprob) else _finite(token.logprob),
            }
            for token in result.prompt_scores
        ],
        "tokens": [_token(token) for token in tokens],
    }
    if any(token.top for token in tokens):
        details["top_tokens"] = [[_token(other) for other in token.top] for token in tokens]
    return details


def _token(token: OutputToken) -> Token:
    return {
        "id": token.id,
        "text": token.text,
        "logprob": _finite(token.logprob),
        "special": token.special,
    }


def _finite(logprob: float) -> float:
    """Replace minus infinity (a probability of 0), which JSON can't express."""
    return logprob if math.isfinite(logprob) else -1e30


class TokenEvents:
    """Write deltas as TGI does: an event for each token, with the text that may be shown.

    A vote has an event for each ballot, without text, then one with the winner's.

    What comes of a token's text behind its first event has another one, with the same token.
    """

    def __init__(self, *, shows_reasoning: bool = True) -> None:
        """Without `shows_reasoning` tokens before the answer are counted, and have no event."""
        self._shows_reasoning = shows_reasoning
        self._index = 0
        self._token: OutputToken | None = None

    def __call__(self, item: tuple[int, TextDelta]) -> bytes:
        """Return the event of a delta."""
        _, delta = item
        token = delta.token or _last_token(delta)
        if token is not None:
            self._index += 1
            self._token = token
        is_hidden = delta.is_reasoning and not self._shows_reasoning and delta.result is None
        return b"" if self._token is None or is_hidden else data_event(json_bytes(self._event(delta)))

    def _event(self, delta: TextDelta) -> StreamEvent:
        result, token = delta.result, self._token
        assert token is not None
        event: StreamEvent = {
            "index": self._index,
            "token": {**_token(token), "text": delta.text},
            "generated_text": None if result is None else result.generated_text,
            "details": None if result is None else _stream_details(result),
        }
        if delta.is_reasoning:
            event["reasoning"] = True
        if delta.step is not None:
            event["step"] = delta.step
        if token.top:
            event["top_tokens"] = [_token(other) for other in token.top]
        if delta.ballot is not None:
            event["ballot"] = ballot_answer(delta.ballot)
        if result is not None and result.vote is not None:
            event["vote"] = vote_answer(result.text, result.vote)
        return event


def _last_token(delta: TextDelta) -> OutputToken | None:
    """Return what stands for a whole answer in its event: clients of TGI expect a token in each."""
    result = delta.result if delta.ballot is None else delta.ballot.result
    if result is None or (delta.ballot is None and result.vote is None):
        return None
    return result.tokens[-1] if result.tokens else None


def _stream_details(result: GenerationResult) -> StreamDetails:
    version = result.version
    return {
        "finish_reason": result.finish.value,
        "generated_tokens": len(result.tokens),
        "input_length": result.prompt_tokens,  # TGI's name
        "prompt_tokens": result.prompt_tokens,  # LoRAX's
        "virtual_tokens": result.virtual_tokens,
        "seed": result.seed,
        "task_version": None if version is None else version.version,
        "version_digest": None if version is None else f"sha256:{version.digest}",
    }
