"""What the composition root wires between the parts."""

import json
from pathlib import Path

import pytest

from app.errors import RateLimited
from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys
from app.keys.keyring import Keyring
from app.main import _base_defaults, _on_outcome
from app.metrics import FAILURES, Metrics
from app.models.loading import load_base
from app.serving.answers import Outcome
from app.serving.base_defaults import BaseDefaults
from app.serving.parameters import GenerationParameters
from app.settings import Settings
from tests.bases import save_tiny_llama


@pytest.mark.parametrize("reason", [*FAILURES, "length"])
def test_only_what_the_server_fails_at_is_free(reason: str, tmp_path: Path) -> None:
    text = new_key_text()
    key = Key(name="a", sha256=hash_of(text), scopes=frozenset({Scope.GENERATE}), tokens_per_minute=50)
    change_keys(tmp_path / "keys.json", lambda keys: [*keys, key])
    keys = Keyring(tmp_path / "keys.json", clock=lambda: 0.0)
    told = _on_outcome(Metrics(), keys)
    told(
        Outcome(
            task="",
            version=0,
            reason=reason,
            prompt_tokens=60,
            generated_tokens=40,
            seconds=1.0,
            timings=None,
            tenant="a",
        )
    )
    if reason == "error":
        keys.take(key, needs_tokens=True)
    else:
        with pytest.raises(RateLimited):
            keys.take(key, needs_tokens=True)


def test_the_bases_defaults_are_told_and_can_be_turned_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save_tiny_llama(tmp_path / "base", positions=64)
    values = {"repetition_penalty": 1.1, "num_beams": 4}
    (directory / "generation_config.json").write_text(json.dumps(values))
    base = load_base(str(directory), dtype="float32", device="cpu", progress=lambda _: None)
    caplog.set_level("INFO")
    defaults = _base_defaults(Settings(), base)
    assert defaults.parameters == GenerationParameters(repetition_penalty=1.1)
    lines = {record.levelname: record.message for record in caplog.records if record.name == "promptplex"}
    assert "repetition_penalty 1.1" in lines["INFO"]
    assert "num_beams = 4" in lines["WARNING"]
    assert _base_defaults(Settings(generation_config="none"), base) == BaseDefaults()
