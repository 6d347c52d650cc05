"""Questions about a document: made by the base itself from parts of it, or read from a file.

For a task without a template, a base with a chat template gets a part of the document and a seed prompt that
wants a question. Otherwise the base goes on with the task's own template behind a part of the document: what
it writes where the field stands is a question.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from app.errors import InvalidRequest
from app.text.message import Message
from app.text.template import PLAIN, Template
from app.training.base import TrainingBase
from app.training.continuing import Context, sampling
from app.training.data_files import DataFile, Row, refused
from app.training.document import Document
from app.training.examples import Example
from app.training.forms import FormReader
from app.training.settings import SelfStudySettings
from app.training.splits import by_input

# One for each kind of question that the paper's seeds ask for (Eyuboglu et al., 2025), in our words.
SEEDS = (
    "Write one question about a detail of the text above that it answers. Write the question alone.",
    "Ask for one name, number or date that the text above gives. Write the question alone.",
    "Ask for a summary of one part of the text above, and say of which part. Write the request alone.",
    "Ask for facts of the text above in a structured form, such as a list. Write the request alone.",
    "Ask a question that takes two facts of the text above together. Write the question alone.",
    "Think of a person who needs the text above for a purpose. Write what they ask, and nothing else.",
)
_PER_CHUNK = 8
_UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and what must have been read before it can be answered."""

    example: Example  # without its output
    part: str | None  # of the document, that it was made from; None: it is of a file


def made_questions(
    base: TrainingBase, document: Document, template: Template, settings: SelfStudySettings, seed: int
) -> Iterator[Asked]:
    """Yield questions that the base writes, each text once; fewer than wanted where it repeats itself.

    Raise InvalidRequest: neither a chat template nor text around the template's one field.
    """
    author = _Author(base, document, template, settings)
    seen = set[str]()
    number = -(-settings.num_questions // _PER_CHUNK)
    for index, part in enumerate(document.parts(number, settings.chunk_tokens)):
        count = min(_PER_CHUNK, settings.num_questions - index * _PER_CHUNK)
        for text in author.questions(part, index, count, seed):
            if text and text not in seen:
                seen.add(text)
                yield Asked(author.example(text), part)


class _Author:
    """Lets the base write questions."""

    def __init__(
        self, base: TrainingBase, document: Document, template: Template, settings: SelfStudySettings
    ) -> None:
        self._base, self._document, self._settings = base, document, settings
        self._is_chat = template is PLAIN and base.encoder.chat.exists
        self._leading = template.leading.rstrip(" ")  # a word's first token mostly has the space before it
        self._stop = "" if self._is_chat else _text_after_field(template)

    def example(self, text: str) -> Example:
        """Return a question as serving gets it."""
        if self._is_chat:
            return Example(messages=(Message("user", text),), output="")
        return Example(inputs=text, output="")

    def questions(self, part: str, index: int, count: int, seed: int) -> list[str]:
        """Return `count` texts about one part of the document; the same for the same seed."""
        context, sources = self._to_read(part, index, count)
        written = Context(self._base, context).continued(
            sources,
            max_new_tokens=self._settings.max_question_tokens,
            is_done=self._is_done,
            choose=sampling(self._settings.question_temperature, seed + index),
        )
        return [self._text(ids) for ids in written]

    def _to_read(self, part: str, index: int, count: int) -> tuple[Sequence[int], list[tuple[int, ...]]]:
        """Return what is read once, and what each question is written after."""
        if not self._is_chat:
            leading = self._base.encoder.tokenizer.plain_ids(self._leading)
            return self._document.ids_of(part), [leading] * count
        seeds = [SEEDS[(index + number) % len(SEEDS)] for number in range(count)]
        wholes = [self._base.encoder.encode_chat([Message("user", f"{part}\n{text}")]).ids for text in seeds]
        shared = _num_shared(wholes)
        return wholes[0][:shared], [whole[shared:] for whole in wholes]

    def _is_done(self, ids: list[int]) -> bool:
        return bool(self._stop) and self._stop in self._base.encoder.tokenizer.text_of(ids)

    def _text(self, ids: list[int]) -> str:
        """Return the question; empty where it didn't come to its end."""
        text = self._base.encoder.tokenizer.text_of(ids)
        if self._stop:
            question, found, _ = text.partition(self._stop)
            return question.strip() if found else ""
        return text.strip() if ids[-1] in self._base.eos_ids else ""


def _text_after_field(template: Template) -> str:
    """Return the text that ends a question. Raise InvalidRequest: the template leaves open where that is."""
    kinds = [piece.field is None for piece in template.pieces]
    if kinds != [True, False, True]:
        raise InvalidRequest(
            "the base writes questions into the task's template, which must have text, one field and text "
            "again for that, such as 'Question: {question}\\nAnswer:'; or give the questions in a file",
            param="template",
        )
    return template.pieces[2].text


def _num_shared(rows: Sequence[tuple[int, ...]]) -> int:
    """Return how many first ids all rows have in common; each keeps one of its own."""
    count = 0
    for column in zip(*(row[:-1] for row in rows), strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def read_questions(path: Path) -> list[Asked]:
    """Read a file: JSON lines (or a table) of `inputs` or `messages`, or a .txt file with a question a line.

    Raise InvalidRequest, which names the line.
    """
    examples = _lines(path) if path.suffix.lower() == ".txt" else _rows(path)
    questions = [group[0] for group in by_input(examples).values()]
    if not questions:
        raise refused(path.name, "it holds no questions")
    return [Asked(question, None) for question in questions]


def _lines(path: Path) -> Iterator[Example]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise refused(path.name, f"it can't be read as UTF-8 text: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield Example(inputs=line.strip(), output="", line=number, file=path.name)


def _rows(path: Path) -> Iterator[Example]:
    """Yield examples read as those of any data file, with an answer that stands for the teacher's."""
    file, reader = DataFile.at(path), FormReader()
    with closing(file.rows()) as rows:
        for row in rows:
            fields = dict(row.fields)
            if isinstance(fields.get("messages"), list):
                fields["messages"] = [*fields["messages"], {"role": "assistant", "content": _UNKNOWN}]
            else:
                fields.setdefault("output", _UNKNOWN)
            yield reader.example(file.name, Row(fields, row.line, is_table=row.is_table))
