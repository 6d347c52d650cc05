"""What the model reads of a request: its version's learned prompt, and token ids, where each of them goes."""

from dataclasses import dataclass
from typing import NamedTuple

from app.errors import InvalidRequest, RequestTooLong
from app.prompt import ModelGeometry, TaskVersion
from app.request import Segment, Source, segments_of
from app.sites import Embedding, Site


@dataclass(frozen=True, slots=True)
class Input:
    """A rendered text in token ids, with the version that it is for."""

    version: TaskVersion | None  # None: the base model
    token_ids: tuple[int, ...]
    leading_ids: tuple[int, ...]  # with which texts of the version begin, as far as they are known
    num_rows: int  # that go on after it: samples or beams
    is_scored: bool  # whether log-probabilities of its tokens are wanted


class ModelInput(NamedTuple):
    """The fields of a Request that say what the model reads."""

    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    source: Source | None = None
    num_scored: int = 0

    @property
    def num_prompt(self) -> int:
        """Ids of the prompt's text, the decoder's beside a source."""
        return len(self.token_ids) + sum(len(segment.token_ids) for segment in self.segments)

    @property
    def num_virtual_tokens(self) -> int:
        """Slots that learned prompts take in the decoder."""
        return sum(segment.num_virtual_tokens for segment in self.segments)


def causal_input(given: Input) -> ModelInput:
    """Return what a causal base reads: learned prompt, leading text, what rows share, then the rest."""
    ids = given.token_ids
    # What rows share is a segment too; the last token stays each one's own.
    leading = 0 if given.is_scored else _num_leading(ids, given.leading_ids)
    shared = len(ids) - 1 if given.num_rows > 1 and not given.is_scored else leading
    version = given.version
    learned = (
        Segment()
        if version is None
        else Segment(prompt_digest=version.prompt_digest, num_virtual_tokens=version.num_virtual_tokens)
    )
    return ModelInput(
        token_ids=ids[shared:],
        segments=segments_of(
            learned,
            Segment(token_ids=ids[:leading]),
            Segment(token_ids=ids[leading:shared], is_kept=False),
        ),
        num_scored=len(ids) - 1 if given.is_scored else 0,
    )


def encoder_decoder_input(id_: str, given: Input, decoder_ids: tuple[int, ...]) -> ModelInput:
    """Return what an encoder-decoder reads: the text as source `id_`, and `decoder_ids` before the answer.

    Keys and values that a version brings are resident; soft prompts depend on the source in all layers but
    the first, so they are run for each source.
    """
    version = given.version
    if version is None or version.prompt_digest is None:
        return ModelInput(decoder_ids, source=Source(id=id_, token_ids=given.token_ids))
    digest, length = version.prompt_digest, version.length
    at_sites = Segment(
        prompt_digest=digest,
        num_virtual_tokens=length(Site.DECODER_SELF),
        num_cross_tokens=length(Site.DECODER_CROSS),
        num_encoder_tokens=length(Site.ENCODER_SELF),
    )
    soft = Segment(prompt_digest=digest, num_virtual_tokens=length(Embedding.DECODER), is_kept=False)
    rows = length(Embedding.ENCODER)
    return ModelInput(
        token_ids=decoder_ids,
        segments=(
            *((at_sites,) if any(map(length, Site)) else ()),
            *((soft,) if soft.num_virtual_tokens else ()),
        ),
        source=Source(
            id=id_,
            token_ids=given.token_ids,
            prompt_digest=digest if rows else None,
            num_virtual_tokens=rows,
        ),
    )


def check_source(source: Source, geometry: ModelGeometry, truncate: int | None) -> None:
    """Refuse a source that the encoder can't take. Raise InvalidRequest (RequestTooLong)."""
    rows, size, limit = source.num_virtual_tokens, len(source.token_ids), geometry.max_source_positions
    if truncate is not None and size > truncate:
        raise InvalidRequest(
            f"The template's own text has {size} tokens with EOS and the like, and truncate ({truncate}) "
            "shortens inputs only; set it to more.",
            param="parameters.truncate",
        )
    if rows + size > limit:
        raise RequestTooLong(
            f"{rows} virtual + {size} input tokens are {rows + size}, but the encoder takes {limit}; shorten "
            f"inputs, or set truncate to at most {limit - rows}, which keeps the first ones.",
            param="inputs",
            limit=limit,
            asked=f"{rows + size} tokens in the input",
        )


def _num_leading(ids: tuple[int, ...], leading: tuple[int, ...]) -> int:
    """Return how many ids the task's leading segment holds; at least one stays the request's own."""
    return len(leading) if len(ids) > len(leading) and ids[: len(leading)] == leading else 0
