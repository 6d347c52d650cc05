from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from app.text.detokenizer import Detokenizer, DetokenizerTables, detokenizer_tables
from tests.text.tokenizer_zoo import ALL, tokenizer_of

slow = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])


@cache
def tables_of(kind: str) -> DetokenizerTables:
    return detokenizer_tables(tokenizer_of(kind))


def pieces(kind: str, ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tables_of(kind), context or [])
    return [*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()]


def whole(kind: str, ids: list[int]) -> str:
    return str(tokenizer_of(kind).backend_tokenizer.decode(ids, skip_special_tokens=True))


def any_ids(kind: str, **bounds: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(tokenizer_of(kind)) - 1), max_size=24, **bounds)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos", "unigram", "word_piece"])
@slow
@given(data=st.data())
def test_pieces_joined_are_the_whole_text(kind: str, data: st.DataObject) -> None:
    ids = data.draw(any_ids(kind))
    assert "".join(pieces(kind, ids)) == whole(kind, ids)


def lossy(kind: str, ids: list[int]) -> str:
    """The text of byte-fallback ids with each byte run decoded as UTF-8 with replacements."""
    tables = tables_of(kind)
    kept = [id_ for id_ in ids if id_ not in tables.special_ids]
    data = b"".join(
        tables.bytes_of.get(id_) or tables.literal(id_).replace("▁", " ").encode() for id_ in kept
    )
    text = data.decode("utf-8", "replace")
    return text[1:] if text.startswith(" ") else text


@pytest.mark.parametrize("kind", ["metaspace", "legacy_llama"])
@slow
@given(data=st.data())
def test_bytes_that_are_no_character_spoil_only_themselves(kind: str, data: st.DataObject) -> None:
    """The library gives up a whole run of byte tokens for one bad byte; we can't take text back."""
    ids = data.draw(any_ids(kind))
    text = "".join(pieces(kind, ids))
    if "\ufffd" not in whole(kind, ids):
        assert text == whole(kind, ids)
    assert text == lossy(kind, ids)


@pytest.mark.parametrize("kind", ["metaspace", "legacy_llama"])
def test_the_librarys_stream_gives_up_where_ours_goes_on(kind: str) -> None:
    """The reason for having one of our own; where this test fails, the library's may take its place."""
    backend = tokenizer_of(kind).backend_tokenizer
    first, *others = [backend.token_to_id(token) for token in ("<0x41>", "<0xFF>", "▁a", "▁a")]
    assert "".join(pieces(kind, [first, *others])) == "A\ufffd a a"
    stream = DecodeStream(skip_special_tokens=True)
    assert stream.step(backend, first) == "A"
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(backend, others)


@pytest.mark.parametrize("kind", ALL)
@slow
@given(text=st.text(alphabet="the film.é漢🙂 \n", max_size=20))
def test_real_text_comes_out_whole(kind: str, text: str) -> None:
    ids = tokenizer_of(kind)(text)["input_ids"]
    assert "".join(pieces(kind, ids)) == whole(kind, ids)


@pytest.mark.parametrize("kind", ALL)
@slow
@given(data=st.data())
def test_a_continuation_reads_as_it_does_after_its_prompt(kind: str, data: st.DataObject) -> None:
    prompt = tokenizer_of(kind)("the film was")["input_ids"]
    answer = tokenizer_of(kind)(data.draw(st.text(alphabet="great cold.é漢🙂", max_size=12)))["input_ids"]
    joined = "".join(pieces(kind, answer, prompt))
    assert whole(kind, prompt) + joined == whole(kind, prompt + answer)


def test_characters_come_out_with_their_last_byte() -> None:
    ids = tokenizer_of("byte_level")("🦉é")["input_ids"]
    parts = pieces("byte_level", ids)
    assert parts.index("🦉") > 0
    assert all("\ufffd" not in part for part in parts)


def test_half_a_character_at_the_end_is_replaced() -> None:
    ids = tokenizer_of("byte_level")("a🦉")["input_ids"][:-1]
    assert pieces("byte_level", ids)[-1] == "\ufffd"


@pytest.mark.parametrize("kind", ["byte_level_bos", "metaspace"])
def test_special_tokens_have_no_text(kind: str) -> None:
    tables = tables_of(kind)
    turn = tokenizer_of(kind).convert_tokens_to_ids("<turn>")
    assert Detokenizer(tables).push(turn) == ""
    assert tables.literal(turn) == "<turn>"
    assert tables.literal(10**6) == ""
