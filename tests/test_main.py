"""What the composition root wires between the parts."""

import asyncio
import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ByteSize
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import RateLimited
from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys
from app.keys.keyring import Keyring
from app.main import _on_outcome, assemble
from app.metrics import FAILURES, Metrics
from app.request import Outcome
from app.serving.generation_request import GenerationRequest
from app.serving.parameters import DEFAULT_MAX_NEW_TOKENS
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
    if reason in ("error", "refused"):
        keys.take(key, needs_tokens=True)
    else:
        with pytest.raises(RateLimited):
            keys.take(key, needs_tokens=True)


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_the_bases_generation_config_counts_unless_turned_off(
    mode: Literal["auto", "none"], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = save_tiny_llama(tmp_path / "base", positions=256)
    values = {"repetition_penalty": 1.7, "max_new_tokens": 12, "num_beams": 4}
    (directory / "generation_config.json").write_text(json.dumps(values))
    caplog.set_level("INFO")
    settings = Settings(
        model=str(directory),
        store=tmp_path / "store",
        dtype="float32",
        kv_cache_bytes=ByteSize(1 << 20),
        generation_config=mode,
    )
    services = assemble(settings, progress=lambda line: None, on_failure=lambda error: None)
    try:
        result = asyncio.run(services.generation.generate(GenerationRequest(inputs="the film")))
    finally:
        services.engine.stop()
        services.source.close()
    told = [record.message for record in caplog.records if "generation config" in record.message]
    if mode == "none":
        assert len(result.tokens) == DEFAULT_MAX_NEW_TOKENS
        assert not told
        return
    assert "repetition_penalty 1.7" in told[0]
    assert "num_beams 4" in told[0]
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = AutoTokenizer.from_pretrained(directory)("the film", return_tensors="pt")
    expected = model.generate(**ids, do_sample=False, pad_token_id=1)
    assert [token.id for token in result.tokens] == expected[0, ids["input_ids"].shape[1] :].tolist()
