"""What the composition root wires between the parts."""

from pathlib import Path

import pytest

from app.errors import RateLimited
from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys
from app.keys.keyring import Keyring
from app.main import _on_outcome
from app.metrics import FAILURES, Metrics
from app.serving.answers import Outcome


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
