"""What a base can never run, whatever else the engine has to do: by a request's own numbers."""

from app.errors import InvalidRequest, RequestTooLong
from app.prompt import ModelGeometry
from app.request import Request, Segment, Source


def check_segments(request: Request, geometry: ModelGeometry) -> None:
    """Refuse segments that hold nothing, or too much, or that others can't share as they say.

    Raises:
        InvalidRequest: as the message says.
    """
    for number, segment in enumerate(request.segments):
        elsewhere = segment.num_cross_tokens + segment.num_encoder_tokens
        if (segment.prompt_digest is None) != (segment.num_virtual_tokens + elsewhere == 0):
            raise InvalidRequest("a prompt and its virtual tokens come together or not at all")
        if (segment.prompt_digest is None) == (not segment.token_ids):
            raise InvalidRequest("a segment is a learned prompt or text: give it one of them")
        if geometry.has_encoder:
            _check_shared(segment, is_leading=number < request.num_kept_segments)
        elif elsewhere:
            raise InvalidRequest("this base has no encoder, so no prompt has virtual tokens there")


def _check_shared(segment: Segment, *, is_leading: bool) -> None:
    """Refuse to keep what depends on the source, and to put a prefix of the source behind it."""
    if segment.is_kept and (segment.token_ids or not is_leading):
        raise InvalidRequest(
            "in an encoder-decoder, keys and values of text depend on the source: such a segment, and what "
            "comes after it, can't be kept"
        )
    if not segment.is_kept and segment.num_cross_tokens + segment.num_encoder_tokens:
        raise InvalidRequest("prefixes in cross-attention and in the encoder come first, and are kept")


def check_source(request: Request, geometry: ModelGeometry) -> None:
    """Refuse a source that the base has no encoder for, or can't take whole, and its absence.

    Raises:
        InvalidRequest, RequestTooLong: as the message says.
    """
    source = request.source
    if geometry.has_encoder != (source is not None):
        raise InvalidRequest(
            "this base is an encoder-decoder: give its encoder a source"
            if source is None
            else "this base has no encoder: give it all its tokens as a prompt, and no source"
        )
    if source is None:
        return
    if (source.prompt_digest is None) != (source.num_virtual_tokens == 0) or not source.num_slots:
        raise InvalidRequest("a source needs a token; a prompt and its virtual tokens come together")
    _check_length(source, geometry.max_source_positions)


def _check_length(source: Source, limit: int) -> None:
    if source.num_slots > limit:
        raise RequestTooLong(
            f"{source.num_virtual_tokens} virtual + {len(source.token_ids)} tokens of the input = "
            f"{source.num_slots}, but the encoder takes {limit}; shorten the input, or set 'truncate'",
            param="inputs",
        )


def check_beams(request: Request, max_rows: int) -> None:
    """Refuse more beams than rows run at once, and beams that can't be held to a grammar.

    Raises:
        InvalidRequest: as the message says.
    """
    beams = request.sampling.num_beams
    if not 1 <= beams <= max_rows:
        raise InvalidRequest(
            f"num_beams: {beams} beams need as many rows, but this server runs {max_rows} rows at once; "
            "lower num_beams in the request or in its task's defaults, or raise the server's max_rows.",
            param="parameters.num_beams",
        )
    if beams > 1 and request.grammar is not None:
        raise InvalidRequest("beams don't go with a grammar; leave one of them out", param="num_beams")


def check_tokens(request: Request, geometry: ModelGeometry) -> None:
    """Refuse ids outside the vocabulary, and more tokens than the base has positions.

    Raises:
        InvalidRequest, RequestTooLong: as the message says.
    """
    ids, segments = request.token_ids, request.segments
    prompt = len(ids) + sum(len(segment.token_ids) for segment in segments)
    ids += tuple(id_ for segment in segments for id_ in segment.id_range)
    if request.source is not None:
        ids += request.source.token_ids
    if request.sampling.logit_bias:
        ids += tuple(id_ for id_, _ in request.sampling.logit_bias)
    if min(ids) < 0 or max(ids) >= geometry.vocab_size:
        raise InvalidRequest(f"token ids must be from 0 to {geometry.vocab_size - 1}")
    total = request.num_virtual_tokens + prompt + request.max_new_tokens
    if total > geometry.max_positions:
        raise RequestTooLong(
            f"{request.num_virtual_tokens} virtual + {prompt} prompt + {request.max_new_tokens} new "
            f"tokens = {total}, but the model has {geometry.max_positions} positions; shorten the "
            "input, ask for fewer new tokens, or set 'truncate'",
            param="max_new_tokens",
        )
