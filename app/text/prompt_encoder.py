"""Prompts to token ids: a task's template and inputs, a chat, or ids. For serving and training."""

from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedTokenizerFast

from app.errors import InvalidRequest, RequestTooLong
from app.text.chat import ChatTemplate, last_of_user
from app.text.message import Message
from app.text.template import MAX_RENDERED_CHARS, PLAIN, Template, bind_inputs
from app.text.tokenization import PromptTokenizer, Tokenized
from app.text.truncation import TruncationSide


class PromptEncoder:
    """Renders and tokenizes for one base model. Safe to use from many threads.

    Every method that takes text refuses what can't fit before it pays for rendering and tokenizing it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_positions: int,
        vocab_size: int,
        side: TruncationSide = TruncationSide.LEFT,
    ) -> None:
        """`max_positions` (of the encoder, where there is one) and `vocab_size` are the model's.

        `side`: the end of the inputs that truncation takes.
        """
        self.chat = ChatTemplate(tokenizer)
        self.tokenizer = PromptTokenizer(tokenizer, control=self.chat.control_tokens(), side=side)
        self._max_positions = max_positions
        self._vocab_size = vocab_size

    def encode(
        self, template: Template, inputs: str | Mapping[str, str], truncate: int | None = None
    ) -> Tokenized:
        """Return the ids of the template with these inputs; `truncate` bounds the inputs' tokens.

        Raise InvalidRequest (RequestTooLong): the inputs don't match the fields, or can't fit or be written.
        """
        values = bind_inputs(template, inputs)
        self._check_size(template.num_chars(values), "inputs", truncate)
        return self.tokenizer.tokenize(template, values, truncate, self._max_positions)

    def encode_chat(self, messages: Sequence[Message], truncate: int | None = None) -> Tokenized:
        """Return the ids of a chat in the base's own template. Raise as `encode`, or where there is none."""
        self._check_size(sum(len(message.content) for message in messages), "messages", truncate)
        return self.tokenizer.tokenize_chat(self.chat.render(messages), truncate, self._max_positions)

    def encode_task_chat(
        self, template: Template, messages: Sequence[Message], truncate: int | None = None
    ) -> Tokenized:
        """Return the ids of a chat with a task: its template takes the user's last message.

        Without a template it is the whole chat in the base's own one, if the base has any. Raise as `encode`.
        """
        if template is PLAIN and self.chat.exists:
            return self.encode_chat(messages, truncate)
        return self.encode(template, last_of_user(messages), truncate)

    def end_id(self, eos_ids: Collection[int]) -> int | None:
        """Return the id that ends an answer, of several the tokenizer's own EOS; None: the base has none."""
        own = self.tokenizer.eos_id
        return own if own in eos_ids else min(eos_ids, default=None)

    def answer_ids(self, text: str, eos_id: int | None) -> tuple[int, ...]:
        """Return the ids of an answer: of its text alone, then the one that ends it, if there is one."""
        ids = self.tokenizer.plain_ids(text)
        return ids if eos_id is None else (*ids, eos_id)

    def encode_ids(self, ids: tuple[int, ...]) -> Tokenized:
        """Return ids that are a whole prompt. Raise as `text_of`."""
        return Tokenized(ids, self.text_of(ids, "inputs"))

    def text_of(self, ids: Sequence[int], param: str) -> str:
        """Return the text of ids, without special tokens.

        Raise InvalidRequest (RequestTooLong) that names `param` where no prompt of the base could hold them.
        """
        if len(ids) > self._max_positions:
            raise RequestTooLong(
                f"{param} has {len(ids)} token ids, but the base has {self._max_positions} positions; "
                "send fewer.",
                param=param,
                asked=f"{len(ids)} tokens in the prompt alone",
            )
        if any(id_ >= self._vocab_size for id_ in ids):
            raise InvalidRequest(f"token ids must be from 0 to {self._vocab_size - 1}", param=param)
        return self.tokenizer.text_of(ids)

    def check_template(self, template: Template) -> None:
        """Raise RequestTooLong where its own text alone doesn't fit, before it is tokenized with inputs."""
        own = self.tokenizer.tokenize(template, dict.fromkeys(template.fields, ""), limit=self._max_positions)
        if len(own.ids) > self._max_positions:
            raise RequestTooLong(
                f"The template's own text has {len(own.ids)} tokens, but the base has {self._max_positions} "
                "positions; shorten it.",
                param="template",
            )

    def _check_size(self, characters: int, param: str, truncate: int | None) -> None:
        if characters > MAX_RENDERED_CHARS:
            raise RequestTooLong(
                f"The text has {characters} characters; at most {MAX_RENDERED_CHARS} are accepted.",
                param=param,
            )
        if truncate is None and self.tokenizer.surely_longer(characters, self._max_positions):
            raise RequestTooLong(
                f"The text has {characters} characters, which can't fit the base model's "
                f"{self._max_positions} positions; shorten {param}, or set parameters.truncate.",
                param=param,
            )
