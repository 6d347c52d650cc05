"""Answers of `/generate` in the shapes of TGI and LoRAX: whole ones, and the events of streams."""

import math
from collections.abc import Sequence

from app.api.schemas.answers import (
    BallotAnswer,
    ChoiceAnswer,
    Details,
    GenerateResponse,
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
    if best.score is not None:
        answer["score"] = best.score
    if with_details:
        answer["details"] = _details(best)
    if best.classification is not None:
        answer["choice"] = _choice(best.text, best.classification)
    if best.vote is not None:
        answer["vote"] = _vote(best.text, best.vote)
    if len(results) > 1:
        answer["samples"] = [_sample(result, with_details) for result in results]
    return answer


def _sample(result: GenerationResult, with_details: bool) -> Sample:
    sample: Sample = {"generated_text": result.generated_text}
    if result.score is not None:
        sample["score"] = result.score
    if with_details:
        sample["details"] = _details(result)
    return sample


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


def _vote(winner: str, vote: Vote) -> VoteAnswer:
    return {
        "winner": winner,
        "share": vote.share,
        "ballots": [_ballot(ballot) for ballot in vote.ballots],
    }


def _ballot(ballot: Ballot) -> BallotAnswer:
    result = ballot.result
    answer: BallotAnswer = {
        "index": ballot.index,
        "answer": result.text,
        "weight": ballot.weight,
        "finish_reason": result.finish.value,
        "generated_tokens": result.num_generated,
        "version": None if result.version is None else result.version.version,
    }
    if result.vote is not None:
        answer["share"] = result.vote.share
    return answer


def _details(result: GenerationResult) -> Details:
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
        "tokens": [_token(token) for token in result.tokens],
    }
    if any(token.top for token in result.tokens):
        details["top_tokens"] = [[_token(other) for other in token.top] for token in result.tokens]
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
    """

    def __init__(self) -> None:
        self._index = 0

    def __call__(self, item: tuple[int, TextDelta]) -> bytes:
        """Return the event of a delta."""
        _, delta = item
        token, result = delta.token or _last_token(delta), delta.result
        if token is None:
            return b""
        self._index += 1
        event: StreamEvent = {
            "index": self._index,
            "token": {**_token(token), "text": delta.text},
            "generated_text": None if result is None else result.generated_text,
            "details": None if result is None else _stream_details(result),
        }
        if token.top:
            event["top_tokens"] = [_token(other) for other in token.top]
        if delta.ballot is not None:
            event["ballot"] = _ballot(delta.ballot)
        if result is not None and result.vote is not None:
            event["vote"] = _vote(result.text, result.vote)
        return data_event(json_bytes(event))


def _last_token(delta: TextDelta) -> OutputToken | None:
    """Return what stands for a whole answer in its event: clients of TGI expect a token in each."""
    result = delta.result if delta.ballot is None else delta.ballot.result
    return result.tokens[-1] if result is not None and result.tokens else None


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
