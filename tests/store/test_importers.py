"""The registry of importers: every module is in it, and files are parsed once whoever looks at them."""

import pkgutil

import pytest

from app.errors import PromptRejected, UnsafeFile
from app.store import importers, source_files
from app.store.importers import IMPORTERS, import_prompt
from app.store.source_files import CONFIG, PROMPT, SourceFile
from tests.store.builders import peft_files, soft


def test_every_module_is_registered() -> None:
    modules = {f"{importers.__name__}.{module.name}" for module in pkgutil.iter_modules(importers.__path__)}
    assert modules == {importer.__name__ for importer in IMPORTERS}  # type: ignore[attr-defined]


def test_an_upload_is_of_one_format() -> None:
    weights, config = peft_files()
    for files in ({PROMPT: weights, CONFIG: config}, {PROMPT: weights}, {PROMPT: soft().data}):
        sources = {name: SourceFile(data) for name, data in files.items()}
        assert sum(importer.recognises(sources) for importer in IMPORTERS) == 1


@pytest.mark.parametrize("data", [peft_files(name="x")[0], b"\x80\x02}q", b"{}", soft().data[:-1]])
def test_a_file_that_no_importer_knows_is_parsed_once(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parse = source_files.parse_safetensors
    monkeypatch.setattr(source_files, "parse_safetensors", lambda data: parsed.append(data) or parse(data))
    with pytest.raises(PromptRejected) as refused:
        import_prompt({PROMPT: data})
    assert parsed == [data]
    assert isinstance(refused.value, UnsafeFile) or "neither a PEFT adapter" in refused.value.message
