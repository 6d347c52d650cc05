"""Self-study: questions from the base, answers and log-probabilities as transformers gives them."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from app.errors import InvalidRequest
from app.text.message import Message
from app.text.template import PLAIN, parse_template
from app.training.base import TrainingBase, training_base
from app.training.distillation import Distillation, TaughtExample, divergence, taught
from app.training.document import Document, new_cartridge, text_prefix
from app.training.examples import EncodedExample, Example
from app.training.prompted_model import PromptedModel
from app.training.questions import Asked, made_questions, read_questions
from app.training.self_study import Study, study
from app.training.settings import SelfStudySettings, TrainingSettings
from tests import oracle
from tests.text.tokenizer_zoo import tokenizer_of
from tests.tiny_models import tiny_model
from tests.training.bases import KIND, causal_base

TEXT = "The mayor of Zorvek is Anna. The baker of Fendar is Otto. "
TEMPLATE = "Q: {question}\nA:"
SETTINGS = SelfStudySettings(num_questions=40, max_answer_tokens=6, max_question_tokens=12, chunk_tokens=20)
ARCHITECTURES = ("llama", "gpt2", "gemma2", "mistral")


def asked(number: int) -> list[Asked]:
    return [Asked(Example(inputs=f"who is no. {index}?", output=""), None) for index in range(number)]


@cache
def studied(architecture: str, repeats: int = 2) -> tuple[TrainingBase, Document, Study]:
    base = causal_base(architecture)
    document = Document(TEXT * repeats, base.encoder.tokenizer)
    return (
        base,
        document,
        study(base, document, TEMPLATE, SETTINGS, num_virtual_tokens=8, questions=asked(24)),
    )


def ids_in_context(document: Document, example: TaughtExample) -> list[int]:
    """The text that the teacher reads, as one that goes on: it begins once."""
    assert example.source[0] == document.ids[0]
    return [*document.ids, *example.source[1:]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_teacher_answers_as_transformers_does(architecture: str) -> None:
    base, document, found = studied(architecture)
    for example in found.train[:4]:
        expected = oracle.greedy(base.model, ids_in_context(document, example), len(example.target))
        assert list(example.target) == expected.tokens
    assert all(1 in each.target or len(each.target) == 6 for each in found.train)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_teachers_log_probabilities_are_those_of_transformers(architecture: str) -> None:
    base, document, found = studied(architecture)
    for example in (*found.train[:4], *found.dev[:2]):
        read = ids_in_context(document, example)
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([[*read, *example.target[:-1]]])).logits[0]
        expected = logits[len(read) - 1 :].log_softmax(-1)
        assert example.top_logprobs.shape == (len(example.target), SETTINGS.top_k)
        torch.testing.assert_close(
            example.top_logprobs, expected.gather(-1, example.top_ids), atol=1e-4, rtol=0
        )
        assert torch.equal(example.top_ids[:, 0], expected.argmax(-1))


def test_a_document_longer_than_the_base_is_read_in_parts() -> None:
    base = causal_base("llama")
    document = Document(TEXT * 8, base.encoder.tokenizer)
    assert len(document.ids) > base.geometry.max_positions
    questions = [replace(each, part="The mayor of Zorvek is Anna.\n") for each in asked(16)]
    found = study(base, document, TEMPLATE, SETTINGS, num_virtual_tokens=8, questions=questions)
    example = found.train[0]
    expected = oracle.greedy(
        base.model, [*document.ids_of(questions[0].part or ""), *example.source[1:]], len(example.target)
    )
    assert list(example.target) == expected.tokens
    with pytest.raises(InvalidRequest, match="questions of a file need all of it"):
        study(base, document, TEMPLATE, SETTINGS, num_virtual_tokens=8, questions=asked(16))


def test_questions_are_in_one_split_each_and_answers_are_the_teachers() -> None:
    base, document, found = studied("llama")
    splits = (found.dataset.train, found.dataset.dev, found.dataset.test)
    assert sum(map(len, splits)) == len({example.inputs for split in splits for example in split}) == 24
    assert all(splits)
    for example, lesson in zip(found.dataset.train, found.train, strict=True):
        assert example.output == base.encoder.tokenizer.text_of(lesson.target)
        assert lesson.source == base.encoder.encode(parse_template(TEMPLATE), example.inputs).ids
    assert found.document is document


def test_the_document_in_context_has_nothing_to_learn_and_a_part_of_it_has() -> None:
    base, document, found = studied("llama")
    lessons = [replace(each, source=each.source[1:]) for each in found.train]  # served with BOS once
    whole, count = Distillation(PromptedModel(base, text_prefix(base, document.ids))).loss(lessons)
    assert count == sum(len(each.target) for each in lessons)
    assert abs(whole.item()) < 1e-4 * count
    part, _ = Distillation(PromptedModel(base, text_prefix(base, document.ids[:8]))).loss(lessons)
    assert part.item() > 0.1 * count


def test_distillation_lowers_the_divergence_and_leaves_the_first_token_as_it_is() -> None:
    base, document, found = studied("llama")
    settings = TrainingSettings(method="cartridge", num_virtual_tokens=8)
    cartridge = new_cartridge(settings, base, document)
    objective, before = Distillation(PromptedModel(base, cartridge)), cartridge.tensors()
    optimizer = torch.optim.AdamW(cartridge.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss, count = objective.loss(found.train)
        optimizer.zero_grad()
        (loss / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item() / count)
    assert losses[-1] < losses[0] / 2
    for name, tensor in cartridge.tensors().items():
        assert torch.equal(tensor[:, :1], before[name][:, :1])
        assert not torch.isclose(tensor[:, 1:], before[name][:, 1:]).all(-1).any()


def test_the_divergence_over_the_whole_vocabulary_is_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 30, generator=generator, requires_grad=True) for _ in range(2))
    example = taught(EncodedExample((1,), (2, 3, 4, 5, 6)), teacher.detach(), top_k=30)
    found = divergence(student, [example])
    expected = functional.kl_div(
        student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="sum", log_target=True
    )
    torch.testing.assert_close(found, expected)
    assert divergence(teacher, [example]).item() == pytest.approx(0, abs=1e-5)


def test_the_divergence_over_the_top_k_falls_where_the_teacher_is() -> None:
    teacher = torch.tensor([[4.0, 3.0, 0.0, -1.0]])
    example = taught(EncodedExample((1,), (0,)), teacher, top_k=2)
    assert example.top_ids.tolist() == [[0, 1]]
    far, near = (
        divergence(torch.tensor([logits]), [example]) for logits in ([0.0] * 4, [4.0, 3.0, 0.0, 0.0])
    )
    assert far > near


SPOKEN = "Say {question}e"  # a random base writes an e before long


def chat_base() -> TrainingBase:
    tokenizer = copy.deepcopy(tokenizer_of(KIND))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=640)
    return training_base("tiny", model, tokenizer, eos_ids=frozenset(range(60)), fingerprint="tiny")


class TestMadeQuestions:
    def test_the_same_seed_makes_the_same_ones(self) -> None:
        base, document, _ = studied("llama")
        made = [
            list(made_questions(base, document, parse_template(SPOKEN), SETTINGS, seed)) for seed in (3, 3, 4)
        ]
        assert made[0] == made[1] != made[2]

    def test_each_is_what_the_base_writes_where_the_field_stands(self) -> None:
        base, document, _ = studied("llama")
        made = list(made_questions(base, document, parse_template(SPOKEN), SETTINGS, seed=0))
        texts = [each.example.inputs for each in made]
        assert 10 < len(texts) == len(set(texts)) <= SETTINGS.num_questions
        assert all(text and "e" not in text for text in texts)
        assert {each.part for each in made} <= set(document.parts(5, SETTINGS.chunk_tokens))

    def test_a_chat_is_about_a_part_of_the_document_and_ends_by_itself(self) -> None:
        base = chat_base()
        document = Document(TEXT * 2, base.encoder.tokenizer)
        made = list(made_questions(base, document, PLAIN, SETTINGS, seed=0))
        assert made
        assert all(each.example.messages[0].role == "user" for each in made)
        found = study(
            base, document, None, SETTINGS, num_virtual_tokens=8, questions=[*made, *chats_of(12)], seed=0
        )
        lesson, example = found.train[0], found.dataset.train[0]
        assert lesson.source == base.encoder.encode_chat(example.messages).ids

    def test_a_template_without_a_place_for_them_is_refused(self) -> None:
        base, document, _ = studied("llama")
        for template in (PLAIN, parse_template("Q: {question}"), parse_template("{a} and {b}:")):
            with pytest.raises(InvalidRequest, match="text, one field and text again"):
                list(made_questions(base, document, template, SETTINGS, seed=0))


def chats_of(number: int) -> list[Asked]:
    return [
        Asked(Example(messages=(Message("user", f"who is no. {index}?"),), output=""), None)
        for index in range(number)
    ]


class TestReadQuestions:
    def test_lines_of_text(self, tmp_path: Path) -> None:
        path = tmp_path / "questions.txt"
        path.write_text("who?\n\n when? \nwho?\n")
        assert [each.example.inputs for each in read_questions(path)] == ["who?", "when?"]

    def test_json_lines_of_inputs_or_chats(self, tmp_path: Path) -> None:
        path = tmp_path / "questions.jsonl"
        path.write_text('{"inputs": {"q": "who?"}}\n{"inputs": {"q": "when?"}}\n')
        assert [each.example.inputs for each in read_questions(path)] == [{"q": "who?"}, {"q": "when?"}]
        path.write_text('{"messages": [{"role": "user", "content": "who?"}]}\n')
        assert read_questions(path)[0].example.messages == (Message("user", "who?"),)

    @pytest.mark.parametrize(
        ("name", "data", "expected"),
        [
            ("q.txt", b"\n", "q.txt: it holds no questions"),
            ("q.txt", b"\xff", "q.txt: it can't be read as UTF-8 text"),
            ("q.jsonl", b'{"inputs": "a"}\n{"input": "b"}\n', "q.jsonl, line 2"),
            ("q.jsonl", b'{"messages": "b"}\n', "q.jsonl, line 1"),
            ("q.pdf", b"a", "aren't read"),
        ],
    )
    def test_what_is_no_question_is_refused(
        self, name: str, data: bytes, expected: str, tmp_path: Path
    ) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidRequest, match=expected):
            read_questions(tmp_path / name)


def test_too_few_answers_are_refused() -> None:
    base, document, _ = studied("llama")
    with pytest.raises(InvalidRequest, match="only 9 of 9 different questions have an answer"):
        study(base, document, TEMPLATE, SETTINGS, num_virtual_tokens=8, questions=asked(9))


def test_a_question_that_the_template_does_not_take_is_named() -> None:
    base, document, _ = studied("llama")
    wrong = Asked(Example(inputs={"other": "x"}, output="", line=3, file="q.jsonl"), None)
    with pytest.raises(InvalidRequest, match=r"q\.jsonl, line 3"):
        study(base, document, TEMPLATE, SETTINGS, num_virtual_tokens=8, questions=[*asked(12), wrong])
