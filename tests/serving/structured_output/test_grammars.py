"""What compiled grammars cost and share, and which tokenizers can be followed at all."""

import random
import threading
from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from app.errors import ConstraintFailed, InvalidRequest
from app.serving.structured_output.constraints import Constraint
from app.serving.structured_output.grammars import MAX_REMEMBERED, Grammars
from tests.serving.structured_output.test_constraints import CHOICE, JSON, REGEX, allowed, grammars_of
from tests.text.tokenizer_zoo import tokenizer_of
from tests.waiting import wait_until

OPTIONAL = {f"k{i}": {"type": "string"} for i in range(1200)}
SENTENCE = "the film was great and I would see it again with my friends because "


@cache
def large_tokenizer() -> PreTrainedTokenizerFast:
    """10,000 tokens, long ones among them, as in real vocabularies."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(6000)]
    corpus = [SENTENCE * 20, "a" * 64, '{"k1": "', *(f'"{word}": {{"{word} {word}s' for word in words)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        special_tokens=["</s>"],
        initial_alphabet=alphabet,
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def large() -> Grammars:
    tokenizer = large_tokenizer()
    assert len(tokenizer) == 10_000
    return Grammars(tokenizer, eos_ids=frozenset({0}), vocab_size=len(tokenizer))


REFUSED_EARLY = {
    "a common beginning": Constraint(CHOICE, [SENTENCE * 13 + str(i) for i in range(256)], "p"),
    "many optional fields": Constraint(
        JSON, {"type": "object", "properties": OPTIONAL, "additionalProperties": False}, "p"
    ),
    "a long repetition": Constraint(REGEX, "a{60000}", "p"),
}


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_what_fails_with_its_first_tokens_is_refused_before(large: Grammars, name: str) -> None:
    with pytest.raises(InvalidRequest, match="too complex to follow; simplify it"):
        large.compile(REFUSED_EARLY[name])


FOLLOWED_TO_THE_END = {
    "many choices": Constraint(CHOICE, [f"{i} {SENTENCE * 13}" for i in range(256)], "p"),
    "a shared beginning": Constraint(CHOICE, [SENTENCE * 2 + str(i) for i in range(256)], "p"),
    "a long constant": Constraint(JSON, {"const": SENTENCE * 58}, "p"),
    "optional fields": Constraint(
        JSON,
        {
            "type": "object",
            "properties": {f"k{i}": {"type": "boolean"} for i in range(300)},
            "additionalProperties": False,
        },
        "p",
    ),
}


@pytest.mark.parametrize("name", FOLLOWED_TO_THE_END)
def test_the_sizes_that_are_documented_hold(large: Grammars, name: str) -> None:
    grammar = large.compile(FOLLOWED_TO_THE_END[name])
    for seed in range(3):
        row, draw = large.start(grammar), np.random.default_rng(seed)
        for _ in range(5000):
            choices = sorted(allowed(row) - {0})
            if not choices:
                break
            row.accept(int(draw.choice(choices)))
        assert allowed(row) == {0}


def test_a_grammar_is_compiled_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = grammars_of(), []
    inner = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda grammar: compiled.append(grammar) or inner(grammar))
    first = grammars.compile(Constraint(REGEX, "first", "p"))
    for _ in range(3):
        assert grammars.compile(Constraint(REGEX, "first", "p")) == first
        grammars.start(first)
    assert len(compiled) == 1
    for number in range(MAX_REMEMBERED):
        grammars.compile(Constraint(REGEX, f"other{number}", "p"))
    assert len(grammars._compiled) == MAX_REMEMBERED
    row = grammars.start(first)  # forgotten meanwhile, and compiled again
    assert len(compiled) == MAX_REMEMBERED + 2
    assert allowed(row)
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            grammars.compile(Constraint(REGEX, "(", "p"))
    assert len(grammars._compiled) == MAX_REMEMBERED, "what can't be used isn't kept"


def test_who_asks_while_a_grammar_is_compiled_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, gate, num_compiled = grammars_of(), threading.Event(), []
    inner = grammars._compile

    def slow(grammar: str) -> object:
        num_compiled.append(grammar)
        assert gate.wait(60)
        return inner(grammar)

    monkeypatch.setattr(grammars, "_compile", slow)
    found: list[str] = []
    constraints = [Constraint(REGEX, "good", "p")] * 4 + [Constraint(REGEX, "(", "p")] * 4

    def ask(constraint: Constraint) -> None:
        try:
            found.append(grammars.compile(constraint))
        except InvalidRequest as error:
            found.append(error.message)

    threads = [threading.Thread(target=ask, args=(each,)) for each in constraints]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(num_compiled) == 2)
    gate.set()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({text for text in found if "can't be used" not in text}) == 1
    assert sum("unclosed group" in text for text in found) == 4
    assert num_compiled.count(grammars.compile(constraints[0])) == 1


def test_rows_that_use_up_a_shared_lexer_take_nobody_along() -> None:
    """Copies of a matcher share its states: a popular grammar must not die of its popularity."""
    grammars, tokenizer = grammars_of(), tokenizer_of("byte_level_bos")
    grammar = grammars.compile(Constraint(REGEX, "([ab]*a[ab]{60}c)+", "p"))
    letters, draw = tokenizer.convert_tokens_to_ids(["a", "b"]), np.random.default_rng(0)
    neighbour, length = grammars.start(grammar), 0
    remembered = grammars._matcher(grammar)
    for _ in range(60):  # 1,000 states each, of 20,000
        row = grammars.start(grammar)
        for _ in range(400):
            assert set(letters) <= allowed(row)
            row.accept(int(draw.choice(letters)))
        neighbour.accept(letters[0])
        length += 1
        assert set(letters) <= allowed(neighbour)
    assert length == 60
    assert grammars._matcher(grammar) is not remembered, "it was used up, and replaced"
    assert allowed(grammars.start(grammar))


def test_what_fails_on_a_lexer_of_its_own_has_failed() -> None:
    grammars = grammars_of()
    row = grammars.start(grammars.compile(Constraint(REGEX, "[b-f]{30}a{4000000000}", "p")))

    def follow() -> None:
        for _ in range(60):
            row.accept(min(allowed(row)))

    with pytest.raises(ConstraintFailed, match="too complex"):
        follow()


def with_tokens(*tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(["</s>", *"abc", *tokens])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize(
    ("tokenizer", "eos", "vocab_size", "reason"),
    [
        (with_tokens("x" * 2000), {0}, 5, "byte by byte"),
        (with_tokens(), {9}, 4, "its end-of-sequence id 9 is beyond its vocabulary of 4 tokens"),
        (with_tokens(), set(), 4, "no token that ends an answer"),
    ],
    ids=["a panic", "an end beyond", "no end"],
)
def test_why_constrained_output_is_off_is_told_once_and_to_who_asks(
    caplog: pytest.LogCaptureFixture,
    tokenizer: PreTrainedTokenizerFast,
    eos: set[int],
    vocab_size: int,
    reason: str,
) -> None:
    grammars = Grammars(tokenizer, eos_ids=frozenset(eos), vocab_size=vocab_size)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=reason):
            grammars.compile(Constraint(REGEX, "a", "p"))
    told = [record.getMessage() for record in caplog.records if "constrained output is off" in record.message]
    assert len(told) == 1
    assert reason in told[0]


def test_tokens_beyond_the_models_vocabulary_never_come() -> None:
    """As after adding tokens to a tokenizer without resizing the model."""
    backend = Tokenizer.from_str(large_tokenizer().backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    size = len(tokenizer)
    tokenizer.add_tokens(["[PAD]", "abc"])
    grammars = Grammars(tokenizer, eos_ids=frozenset({0, size + 1}), vocab_size=size)
    row = grammars.start(grammars.compile(Constraint(REGEX, "(abc|\\[PAD\\])+", "p")))
    spelled = ""
    while len(spelled) < 12:
        first = allowed(row)
        assert first
        assert max(first) < size
        id_ = max(first - {0}, key=lambda each: len(tokenizer.decode([each])))
        spelled += tokenizer.decode([id_])
        row.accept(id_)
    assert spelled.startswith(("abc", "[PAD]"))


def test_what_only_the_tokenizer_can_say_fails_alone() -> None:
    tokenizer = with_tokens("d", "e")
    grammars = Grammars(tokenizer, eos_ids=frozenset({0}), vocab_size=4)
    row = grammars.start(grammars.compile(Constraint(REGEX, "ad", "p")))
    assert allowed(row) == {1}
    row.accept(1)
    with pytest.raises(ConstraintFailed, match="no token of the base model"):
        row.mask()
