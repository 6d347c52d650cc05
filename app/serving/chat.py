"""Chats: the base's own chat template around messages, whose text never becomes special tokens.

The template is rendered around marks that stand for the contents; cut at the marks it is a Template
like any other, with a field for each message. So a message can't forge a turn of the assistant.
"""

import re
from collections.abc import Mapping, Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from app.errors import InvalidRequest
from app.serving.answers import Message
from app.serving.template import Piece, Template

# Private-use characters, which no template writes.
_MARK = re.compile("\ue0f0([0-9]+)\ue0f1")


class ChatTemplate:
    """The chat template of a base model, if it has one. Used from many threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Message], *, is_task: bool) -> tuple[Template, Mapping[str, str]]:
        """A template of this chat, and the values of its fields.

        Without a chat template a task gets the last message of the user as it is; for the base model that is
        an InvalidRequest.
        """
        if self._tokenizer.chat_template is None:
            if not is_task:
                raise InvalidRequest(
                    "The base model has no chat template; use /v1/completions, or a task as model.",
                    param="messages",
                )
            return Template((Piece("", "message"),), ("message",)), {"message": last_of_user(messages)}
        marked = [
            {"role": message.role, "content": f"\ue0f0{index}\ue0f1"}
            for index, message in enumerate(messages)
        ]
        try:
            text = self._tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidRequest(
                f"The base's chat template doesn't take these messages: {error}", param="messages"
            ) from None
        pieces = tuple(_pieces(str(text)))
        fields = tuple(dict.fromkeys(piece.field for piece in pieces if piece.field is not None))
        if not fields:
            raise InvalidRequest("The base's chat template shows none of these messages.", param="messages")
        return Template(pieces, fields), {
            f"message_{index}": message.content for index, message in enumerate(messages)
        }


def last_of_user(messages: Sequence[Message]) -> str:
    """What the user said last. Raises InvalidRequest where there is nothing."""
    for message in reversed(messages):
        if message.role == "user":
            return message.content
    raise InvalidRequest("The chat has no message of the role user.", param="messages")


def _pieces(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    for index, part in enumerate(_MARK.split(text)):
        if index % 2:
            pieces.append(Piece("", f"message_{part}"))
        elif part:
            pieces.append(Piece(part))
    return pieces
