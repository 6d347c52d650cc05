"""The benchmark of programs runs, and counts what each of a pair takes through the model."""

import json

import pytest

from benchmarks.programs import main


def test_what_is_shared_is_computed_once(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--rounds 1 --prompt-tokens 40 --steps 3 --step-tokens 5 --ballots 4 --questions 5"
    main(["--shape", "tiny", *sizes.split(), "--question-tokens", "4"])
    found = json.loads(capsys.readouterr().out)["programs"]
    assert set(found) == {"chain", "vote", "questions"}
    assert found["chain"]["tokens"] == {"shared": 40 + 14, "separate": 40 + 45 + 50 + 3 * 4}
    assert found["vote"]["tokens"] == {"shared": 39 + 4 + 4 * 4, "separate": 4 * 40 + 4 * 4}
    assert found["questions"]["tokens_ratio"] > 2
