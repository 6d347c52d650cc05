"""Foreign checkpoints -> Prompt. A format is one module, which knows no other, and its line in IMPORTERS.

Nothing uploaded is imported, unpickled, executed or fetched.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from app.errors import PromptRejected
from app.prompt import ModelGeometry
from app.store.importers import native, peft
from app.store.source_files import PROMPT, Imported, Importer, SourceFile

# The first one that recognises an upload reads it.
IMPORTERS: tuple[Importer, ...] = (peft, native)


def import_prompt(files: Mapping[str, bytes], base: ModelGeometry | None = None) -> Imported:
    """Import the files of an upload, by name (PROMPT, CONFIG), each of which is parsed once.

    `base`, where one is loaded, says what a format leaves out. The caller must compare the tensors `beside`
    the prompt with the base's own. Raise PromptRejected (UnsafeFile) and keep nothing.
    """
    if not files.get(PROMPT):
        raise PromptRejected("There is no prompt file: send adapter_model.safetensors with its config")
    sources = {name: SourceFile(data) for name, data in files.items()}
    importer = next((each for each in IMPORTERS if each.recognises(sources)), None)
    if importer is None:
        _ = sources[PROMPT].safetensors  # says why where it isn't even that
        known = " nor ".join(each.DESCRIPTION for each in IMPORTERS)
        raise PromptRejected(f"The file is neither {known}")
    imported = importer.read(sources, base)
    digest = _source_digest(imported, files[PROMPT])
    return replace(imported, provenance={**imported.provenance, "source_sha256": digest})


def _source_digest(imported: Imported, data: bytes) -> str:
    return imported.prompt.digest if imported.prompt.data is data else hashlib.sha256(data).hexdigest()
