"""One message of a chat, apart from what renders it, so that small commands needn't wait for transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str
    content: str
    others: Mapping[str, Any] = field(default_factory=dict)  # what else a template may look at (name, ...)

    @property
    def size(self) -> int:
        """Return the characters of its texts."""
        return len(self.content) + sum(len(text) for text in self.others.values() if isinstance(text, str))
