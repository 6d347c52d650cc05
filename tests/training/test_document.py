"""A cartridge before its first step: the document's keys and values, served as the document in context."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from app.engine.engine import Engine, EngineConfig
from app.errors import InvalidRequest
from app.models.packed_model import tensor_of
from app.prompt import Prompt, VersionDraft
from app.request import Request
from app.sites import Site
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import open_store
from app.training.base import TrainingBase
from app.training.document import Document, new_cartridge, read_document, text_prefix
from app.training.prompts import as_prompt
from app.training.settings import TrainingSettings
from benchmarks.completions import submit
from tests import oracle
from tests.tiny_models import packed_backbone
from tests.training.bases import causal_base, seq2seq_base

TEXT = "The mayor of Zorvek is Anna. The baker of Fendar is Otto. " * 2
QUESTION = "Who is the mayor of Zorvek?"
NEW_TOKENS = 8


def cartridge_settings(num_virtual_tokens: int) -> TrainingSettings:
    return TrainingSettings(method="cartridge", num_virtual_tokens=num_virtual_tokens)


def question_ids(base: TrainingBase) -> tuple[int, ...]:
    return base.encoder.tokenizer.plain_ids(QUESTION)


@contextmanager
def served(base: TrainingBase, prompt: Prompt, root: Path) -> Iterator[Engine]:
    store = open_store(root)
    store.publish("cartridge", VersionDraft(prompt=prompt))
    source = PromptCache(store, host_bytes=1 << 20)
    config = EngineConfig(max_rows=4, token_budget=256, kv_cache_bytes=8 << 20)
    engine = Engine(packed_backbone(base.model), source, config)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        source.close()


def test_a_cartridge_starts_as_the_documents_first_keys_and_values() -> None:
    base = causal_base("llama")
    document = Document(TEXT, base.encoder.tokenizer)
    prompt = as_prompt(new_cartridge(cartridge_settings(9), base, document))
    cache = DynamicCache()
    base.model(input_ids=torch.tensor([document.ids]), past_key_values=cache, use_cache=True)
    assert document.ids[0] == base.tokenizer.bos_token_id
    for number, layer in enumerate(cache.layers):
        for side, expected in (("k", layer.keys), ("v", layer.values)):  # type: ignore[union-attr]
            found = tensor_of(prompt, Site.DECODER_SELF.tensor(number, side))
            assert expected is not None
            torch.testing.assert_close(found, expected[0, :, :9], atol=1e-5, rtol=0)
    assert (prompt.num_virtual_tokens, prompt.position_offset) == (9, 9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral"])
def test_the_whole_document_as_a_cartridge_is_the_document_in_context(
    architecture: str, tmp_path: Path
) -> None:
    base = causal_base(architecture)
    document = Document(TEXT, base.encoder.tokenizer)
    prompt = as_prompt(new_cartridge(cartridge_settings(len(document.ids)), base, document))
    expected = oracle.greedy(base.model, [*document.ids, *question_ids(base)], NEW_TOKENS)
    request = Request(
        id="q",
        task="cartridge",
        token_ids=question_ids(base),
        segments=oracle.segments(prompt),
        max_new_tokens=NEW_TOKENS,
    )
    with served(base, prompt, tmp_path) as engine:
        found = submit(engine, request).result(timeout=60)
    assert list(found.token_ids) == expected.tokens
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def document_of(text: str) -> Document:
    return Document(text, causal_base("llama").encoder.tokenizer)


def test_parts_are_whole_lines_and_sentences_spread_over_the_document() -> None:
    sentences = [f"Line {index} says no. What is it?" for index in range(10)]
    document = document_of(" ".join(sentences[:5]) + "\n" + "\n".join(sentences[5:]))
    size = 2 * len(document_of(sentences[0]).ids)
    parts = list(document.parts(6, size))
    assert parts[0].startswith("Line 0 says no.")
    assert parts[-1].endswith("Line 9 says no. What is it?\n")
    assert all(part.endswith((".\n", "?\n")) and part[:4] in ("Line", "What") for part in parts)
    assert all(size / 2 < len(document.ids_of(part)) <= size + 2 for part in parts)
    assert all(any(sentence[:6] in part for part in parts) for sentence in sentences)
    assert list(document.parts(2, 999)) == [document.text] * 2


def test_a_line_that_never_ends_is_cut() -> None:
    document = document_of("no end " * 40)
    parts = list(document.parts(4, 20))
    assert parts[0].startswith("no end")
    assert parts[-1].endswith("no end\n")
    assert all(len(document.ids_of(part)) <= 22 for part in parts)


def test_a_request_behind_the_document_begins_no_second_time() -> None:
    document = document_of("Line.")
    bos = document.ids[0]
    assert bos == causal_base("llama").tokenizer.bos_token_id
    assert document.without_beginning((bos, 8)) == (8,)
    assert document.without_beginning((8, bos)) == (8, bos)


@pytest.mark.parametrize(
    ("num_virtual_tokens", "expected"),
    [
        (60, "the document has 56 tokens"),
        (330, "leave none of the base's 320 positions"),
        (1, "1 of 1 virtual tokens frozen leave none to learn"),
    ],
)
def test_a_length_that_cannot_be_is_refused(num_virtual_tokens: int, expected: str) -> None:
    base = causal_base("llama")
    document = Document(TEXT[:58] * (8 if num_virtual_tokens > 300 else 1), base.encoder.tokenizer)
    with pytest.raises(InvalidRequest, match=expected):
        new_cartridge(cartridge_settings(num_virtual_tokens), base, document)


def test_an_encoder_decoder_takes_no_cartridge() -> None:
    with pytest.raises(InvalidRequest, match="a decoder alone that takes prefixes, and 't5' is none"):
        text_prefix(seq2seq_base("t5"), (3, 4, 5))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"ab\xff", "it is not UTF-8 at byte 2"),
        (None, "no such file"),
    ],
)
def test_what_is_no_document_is_refused(data: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "document.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InvalidRequest, match=expected):
        read_document(path, causal_base("llama"))


def test_a_document_is_its_text(tmp_path: Path) -> None:
    base = causal_base("llama")
    path = tmp_path / "document.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert read_document(path, base).ids == Document(TEXT, base.encoder.tokenizer).ids
    assert len(read_document(path, base).digest) == 64
