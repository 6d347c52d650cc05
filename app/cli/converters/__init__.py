"""Foreign checkpoints that only PyTorch or NumPy open -> canonical prompts, on the user's own machine.

No file is unpickled: PyTorch reads tensors alone (`weights_only=True`), NumPy arrays alone
(`allow_pickle=False`). A format is one module, which knows no other, and its line in CONVERTERS. What PEFT
wrote needs no conversion: the server imports it.
"""

from pathlib import Path
from typing import Protocol

from app.cli.converters import embeddings, prefix_tuning
from app.prompt import Prompt, TaskType


class Converter(Protocol):
    """One format of trained prompts that the server doesn't read."""

    DESCRIPTION: str  # of what it reads, as in "a NumPy file"

    def recognises(self, source: Path) -> bool:
        """Return whether a file or a directory is of this format, by the names of its files."""
        ...

    def read(self, source: Path, task_type: TaskType | None) -> Prompt:
        """Convert what it recognises, for bases of `task_type`; None: the format's usual one.

        Raise ValueError, PromptRejected, OSError.
        """
        ...


CONVERTERS: tuple[Converter, ...] = (embeddings, prefix_tuning)


def convert_prompt(source: Path, task_type: TaskType | None = None) -> Prompt:
    """Convert a file or a directory. Raise FileNotFoundError, ValueError, PromptRejected, OSError."""
    if not source.exists():
        raise FileNotFoundError(2, "no such file or directory", str(source))
    converter = next((each for each in CONVERTERS if each.recognises(source)), None)
    if converter is None:
        known = "; ".join(each.DESCRIPTION for each in CONVERTERS)
        raise ValueError(
            f"{source} is nothing that can be converted. Expected: {known}. What PEFT saved as safetensors "
            "needs no conversion: push it"
        )
    return converter.read(source, task_type)
