"""Prompts that are in our own format already, perhaps written by another program's safetensors."""

from app.prompt import Prompt
from app.store.prompt_file import FORMAT, parse_safetensors, read_prompt, rewrite_prompt


def is_native(weights: bytes) -> bool:
    """Whether the metadata claims our format. Raises UnsafeFile where it is not safetensors."""
    return parse_safetensors(weights).metadata.get("format") == FORMAT


def import_native(weights: bytes) -> Prompt:
    """Verify all of the file and bring it to canonical bytes. Raises PromptRejected (UnsafeFile)."""
    return read_prompt(rewrite_prompt(weights))
