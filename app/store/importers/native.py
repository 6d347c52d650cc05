"""Prompts in our own format, also as other writers of safetensors order it."""

from app.prompt import ModelGeometry
from app.store.prompt_file import FORMAT, canonical_prompt
from app.store.source_files import CONFIG, PROMPT, Imported, SourceFiles

DESCRIPTION = "a promptplex prompt"


def recognises(files: SourceFiles) -> bool:
    """Return whether the metadata claims our format."""
    file = files[PROMPT].safetensors_or_none
    return CONFIG not in files and file is not None and file.metadata.get("format") == FORMAT


def read(files: SourceFiles, base: ModelGeometry | None) -> Imported:
    """Verify all of the file and bring it to canonical bytes. Raise PromptRejected."""
    prompt = canonical_prompt(files[PROMPT].safetensors)
    return Imported(prompt=prompt, provenance={"source_format": "promptplex"})
