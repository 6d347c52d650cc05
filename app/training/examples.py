"""The nouns of training data: examples as a file has them, in splits, and as token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from app.scoring.items import Item
from app.text.message import Message

Inputs = str | Mapping[str, str]  # what `/generate` takes: a text, or the template's fields


class Form(StrEnum):
    """The fields of a line, all of which have the same form."""

    INPUTS = "inputs and output"
    PROMPT = "prompt and completion"  # the prompt is the whole text, as it stands
    MESSAGES = "messages"
    LABEL = "text and label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of a data file: what is asked, and the answer that is right."""

    output: str
    inputs: Inputs = ""
    messages: tuple[
        Message, ...
    ] = ()  # of a chat, in place of inputs; `output` is the next assistant message
    answer: str | None = None  # what a right output ends with
    slots: tuple[str, ...] | None = None  # what must all be in a right output
    line: int = 0  # of its file, from 1
    file: str = ""  # its name, without folders

    @property
    def place(self) -> str:
        """Return where it stands, as messages begin."""
        return f"{self.file or 'data'}, line {self.line}"

    @property
    def item(self) -> Item:
        """Return it as scores know it; the inputs of a chat are its messages, as JSON objects."""
        chat = [{"role": each.role, "content": each.content, **each.others} for each in self.messages]
        return Item(inputs=chat or self.inputs, expected=self.output, slots=self.slots, answer=self.answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """All examples of one task, each in one of three splits."""

    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    digest: str  # sha256 (hex) of the file's bytes; of several files' names and digests
    form: Form = Form.INPUTS
    choices: tuple[str, ...] = ()  # labels, where the data has the form of text and label
    warnings: tuple[str, ...] = ()  # a line each, such as near-duplicates between splits


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids of one example, as serving reads and writes them."""

    source: tuple[int, ...]  # the rendered prompt, with all that the tokenizer's post-processor adds
    target: tuple[int, ...]  # the answer and EOS; for an encoder-decoder after its start token
    task: int = 0  # which of the tasks that learn together
