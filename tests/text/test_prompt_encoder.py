"""Text stands alone: from a template to ids and back, without an engine or a service."""

import subprocess
import sys

import pytest

from app.errors import RequestTooLong
from app.text.detokenizer import Detokenizer, detokenizer_tables
from app.text.message import Message
from app.text.prompt_encoder import PromptEncoder
from app.text.template import parse_template
from tests.text.tokenizer_zoo import ALL, tokenizer_of

PROGRAM = """
import pkgutil, sys
import app.text
for module in pkgutil.iter_modules(app.text.__path__):
    __import__(f"app.text.{module.name}")
print(*sorted({name.split(".")[1] for name in sys.modules if name.startswith("app.")}))
"""


def encoder_of(kind: str, positions: int = 64) -> PromptEncoder:
    tokenizer = tokenizer_of(kind)
    return PromptEncoder(tokenizer, max_positions=positions, vocab_size=len(tokenizer))


def test_it_needs_no_room_above() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"text", "errors", "logs", "concurrency", "caching", "strict_json"}


@pytest.mark.parametrize("kind", ALL)
def test_a_template_becomes_ids_and_its_text_again(kind: str) -> None:
    encoder, template = encoder_of(kind), parse_template("The food: {food}\nIt was {how}.")
    encoded = encoder.encode(template, {"food": "cold", "how": "great"})
    assert encoded.text == "The food: cold\nIt was great."
    detokenizer = Detokenizer(detokenizer_tables(tokenizer_of(kind)))
    texts = [detokenizer.push(id_) for id_ in encoded.ids]
    assert "".join([*texts, detokenizer.flush()]) == tokenizer_of(kind).decode(
        encoded.ids, skip_special_tokens=True
    )
    assert encoder.encode_ids(encoded.ids).ids == encoded.ids


def test_what_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    encoder = encoder_of("byte_level_bos", positions=4)
    for encode in (
        lambda: encoder.encode(parse_template("{x}"), "film" * 100_000),
        lambda: encoder.encode_chat([Message("user", "film" * 100_000)]),
        lambda: encoder.encode_ids((5,) * 5),
        lambda: encoder.check_template(parse_template("the film was great: {x}")),
    ):
        with pytest.raises(RequestTooLong):
            encode()
