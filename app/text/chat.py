"""Chats: the base's own chat template around messages. A message's text never becomes special tokens."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from app.errors import InvalidRequest, PromptplexError
from app.text.chat_rendering import ChatRenderer, foreign
from app.text.message import Message
from app.text.template import Piece
from app.text.tracked_text import TrackedText, own_text

# Templates write roles into names of tokens, as in <|user|>; such a word can't forge one.
_ROLE = re.compile(r"[A-Za-z_]{1,32}")
_MAX_REASON_CHARS = 300
_PROBES = (("user", "assistant", "user"), ("system", "user", "assistant", "user"))
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which transformers looks for it


class ChatTemplate:
    """The chat template of a base model, if it has one. Used from many threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    @property
    def exists(self) -> bool:
        """Return whether the base has one."""
        return self._tokenizer.chat_template is not None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> tuple[Piece, ...]:
        """Return the rendered chat: the template's own text, and stretches of the field `messages`.

        With `add_generation_prompt` the beginning of the next answer comes last. Raise InvalidRequest, which
        says why, where there is no template, or it doesn't take these messages.
        """
        if not self.exists:
            raise InvalidRequest(
                "The base model has no chat template; use /v1/completions, or a task as model.",
                param="messages",
            )
        data, tokens = [_data(message) for message in messages], self._tokenizer.special_tokens_map
        try:
            text = self._renderer.render(data, tokens, add_generation_prompt=add_generation_prompt)
        except PromptplexError:
            raise
        except Exception as error:  # a template may raise anything
            reason = str(error).split("\n")[0][:_MAX_REASON_CHARS] or type(error).__name__
            raise InvalidRequest(
                f"The base's chat template doesn't take these messages: {reason.rstrip('.')}.",
                param="messages",
            ) from None
        return tuple(Piece(part, None if is_own else "messages") for part, is_own in text.stretches())

    @cached_property
    def _renderer(self) -> ChatRenderer:
        named = self._tokenizer.chat_template
        if isinstance(named, dict) and "default" not in named:
            names = ", ".join(sorted(named))[:_MAX_REASON_CHARS]
            raise InvalidRequest(
                f"The base model has chat templates by name ({names}), "
                "none of which is the default; use /v1/completions, or a task with a template as model.",
                param="messages",
            )
        return ChatRenderer(self._tokenizer.get_chat_template())

    def control_tokens(self) -> frozenset[str]:
        """Return added tokens that mark turns though some tokenizers don't flag them as special."""
        added = self._tokenizer.added_tokens_decoder.values()
        ordinary = {token.content for token in added if not token.special and not token.content.isspace()}
        if not self.exists or not ordinary:
            return frozenset()
        declared = getattr(self._tokenizer, "chat_control_tokens", None)
        if declared is not None:
            return frozenset(ordinary & set(declared))
        turns = "\0".join(map(self._turns, _PROBES))
        return frozenset(content for content in ordinary if content in turns)

    def _turns(self, roles: Sequence[str]) -> str:
        """Return what the template itself writes around finished messages."""
        try:
            pieces = self.render([Message(role, "a") for role in roles], add_generation_prompt=False)
        except InvalidRequest:
            return ""
        return "\0".join(piece.text for piece in pieces if piece.field is None)


def _data(message: Message) -> dict[str, Any]:
    """Return a message as transformers passes it to a template: without null, reasoning under each name."""
    role = own_text(message.role) if _ROLE.fullmatch(message.role) else TrackedText(message.role)
    shown = {"role": role, "content": foreign(message.content)}
    shown |= {name: foreign(value) for name, value in message.others.items() if value is not None}
    reasoning = next((shown[name] for name in _REASONING if name in shown), None)
    return shown if reasoning is None else {"thinking": reasoning, **shown, "reasoning_content": reasoning}


def last_of_user(messages: Sequence[Message]) -> str:
    """Return the user's last message. Raise InvalidRequest where there is none."""
    for message in reversed(messages):
        if message.role == "user":
            return message.content
    raise InvalidRequest("The chat has no message of the role user.", param="messages")
