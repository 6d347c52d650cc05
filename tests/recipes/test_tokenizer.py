"""The tokenizer that the recipe trains, and the rows that documents become."""

import pytest

from demo.recipes.corpus import documents
from demo.recipes.rows import CONTEXT_WEIGHT, OUTPUT_WEIGHT, PLAIN_WEIGHT, ROW_LENGTH, encode, pack
from demo.recipes.tokenizer import append_eos, train_tokenizer

DOCUMENTS = list(documents(1500, seed=4))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(document.text for document in DOCUMENTS)


@pytest.mark.parametrize(
    "text",
    [
        "The Eagle is a cheap Italian pub.\n",
        "name[Zorvek's Café], area[east end]",
        "3 * (4 + 5)  and\ttabs",
        " leading, trailing ",
        "naïve 東京 🙂",
        "",
    ],
)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_only_two_special_tokens_and_no_bos(tokenizer):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids


def test_an_encoders_tokenizer_ends_every_source_with_eos():
    tokenizer = append_eos(train_tokenizer(document.text for document in DOCUMENTS[:200]))
    bare = tokenizer("hello\n", add_special_tokens=False).input_ids
    assert tokenizer("hello\n").input_ids == [*bare, 0]
    assert tokenizer.decode([*bare, 0], skip_special_tokens=True) == "hello\n"


def test_digits_stand_alone(tokenizer):
    assert len(tokenizer("2021").input_ids) == 4


def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer):
    name = tokenizer("Zorvek").input_ids
    for before, after in (("name[", "], food[x]"), ("", " is a pub."), ("It is near ", ".")):
        ids = tokenizer(f"{before}Zorvek{after}").input_ids
        assert any(ids[start : start + len(name)] == name for start in range(len(ids)))


def test_the_end_of_the_input_is_a_token_boundary(tokenizer):
    for document in DOCUMENTS[:200]:
        apart = tokenizer(document.context).input_ids + tokenizer(document.output).input_ids
        assert apart == tokenizer(document.text).input_ids


def test_documents_are_packed_whole(tokenizer):
    encoded = [(ids, weights) for ids, weights in encode(DOCUMENTS, tokenizer) if len(ids) <= ROW_LENGTH]
    rows = pack(encoded, tokenizer.pad_token_id)
    assert rows.ids.shape == rows.weights.shape
    assert rows.ids.shape[1] == ROW_LENGTH
    unpacked = [tuple(piece) for row in rows.ids.tolist() for piece in split_at_eos(row)]
    assert sorted(unpacked) == sorted(tuple(ids) for ids, _ in encoded)
    assert (rows.weights > 0).float().mean() > 0.9


def test_outputs_weigh_more_than_what_is_only_read(tokenizer):
    for document, (ids, weights) in zip(DOCUMENTS, encode(DOCUMENTS, tokenizer), strict=True):
        assert len(ids) == len(weights)
        assert weights[-1] == (PLAIN_WEIGHT if document.plain else OUTPUT_WEIGHT)
        assert document.plain or weights[0] == CONTEXT_WEIGHT


def split_at_eos(row):
    piece = []
    for token in row:
        piece.append(token)
        if token == 0:
            yield piece
            piece = []
