"""Prompts in host memory, bounded by bytes."""

from collections import OrderedDict

from app.prompt import Prompt


class HostCache:
    """Prompts in host memory, the least recently used dropped first, bounded by bytes.

    Prompts are immutable: dropping one here takes nothing from those who hold it. Not
    thread-safe; its owner locks.
    """

    def __init__(self, capacity: int) -> None:
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()
        self._capacity = capacity
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes held; never more than the capacity."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._prompts)

    def get(self, digest: str) -> Prompt | None:
        """The prompt, now the most recently used one."""
        prompt = self._prompts.get(digest)
        if prompt is not None:
            self._prompts.move_to_end(digest)
        return prompt

    def put(self, prompt: Prompt) -> None:
        """Keep it, dropping others; one that is larger than the whole cache is not kept."""
        if prompt.digest in self._prompts or len(prompt.data) > self._capacity:
            return
        self._prompts[prompt.digest] = prompt
        self._num_bytes += len(prompt.data)
        while self._num_bytes > self._capacity:
            _, dropped = self._prompts.popitem(last=False)
            self._num_bytes -= len(dropped.data)

    def check_integrity(self) -> None:
        """Assert that the accounts agree with what is held."""
        assert self._num_bytes == sum(len(prompt.data) for prompt in self._prompts.values())
        assert self._num_bytes <= self._capacity
        assert all(digest == prompt.digest for digest, prompt in self._prompts.items())
