"""What importers read, and what they return."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from app.errors import PromptRejected
from app.prompt import ModelGeometry, Prompt
from app.store.safetensors_file import SafetensorsFile, parse_safetensors
from app.store.saved_tensors import SavedTensor
from app.strict_json import parse_json

PROMPT = "prompt"  # the file of weights: PEFT's adapter_model.safetensors, or another format's
CONFIG = "config"  # PEFT's adapter_config.json


class SourceFile:
    """One file of an upload. It is parsed once, however many importers look at it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @cached_property
    def json(self) -> Any:
        """Return what the file says as JSON. Raise JsonError."""
        return parse_json(self.data)

    @property
    def safetensors(self) -> SafetensorsFile:
        """Return the file with its checked header. Raise PromptRejected (UnsafeFile)."""
        if isinstance(self._parsed, PromptRejected):
            raise self._parsed
        return self._parsed

    @property
    def safetensors_or_none(self) -> SafetensorsFile | None:
        """Return the same, or None where the file isn't safetensors."""
        return None if isinstance(self._parsed, PromptRejected) else self._parsed

    @cached_property
    def _parsed(self) -> SafetensorsFile | PromptRejected:
        try:
            return parse_safetensors(self.data)
        except PromptRejected as error:
            return error


SourceFiles = Mapping[str, SourceFile]  # by name: PROMPT, CONFIG


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A prompt, and what its files say of where it comes from."""

    prompt: Prompt
    provenance: Mapping[str, Any]  # source_format and what else is known: recorded, never proof
    beside: tuple[SavedTensor, ...] = ()  # other tensors of the file, which must be the base's own


class Importer(Protocol):
    """One format of trained prompts: a module of `app/store/importers/`."""

    DESCRIPTION: str  # of an upload that it reads, as in "an adapter with its config"

    def recognises(self, files: SourceFiles) -> bool:
        """Return whether the files, of which PROMPT is one, are of this format."""
        ...

    def read(self, files: SourceFiles, base: ModelGeometry | None) -> Imported:
        """Import files that it recognises. Raise PromptRejected (UnsafeFile).

        `base`, where one is loaded, says what a format leaves out; whether the prompt fits is checked later.
        """
        ...
