"""`promptplex doctor` reports, in words and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]


def test_the_report_of_a_machine_and_a_model(promptplex: Run, base: Path) -> None:
    status, out, _ = promptplex("doctor", "--model", str(base), "--dtype", "float32", "--speed", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["measured"]["read_gb_per_s"] > 0
    assert report["measured"]["matmul_float32_gflop_per_s"] > 0
    assert report["model"]["name"] == "tiny"
    assert report["model"]["layers"] == 2
    assert report["model"]["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert report["model"]["probe_twin_error"] < 1e-4
    assert len(report["limits"]) == 3
    for step in report["limits"].values():
        assert 0 < step["least_ms"] < step["taken_ms"]
        assert step["limited_by"] in ("reading weights", "reading keys and values", "arithmetic")
        assert 0 <= step["reached"] < 1


def test_the_report_in_words(promptplex: Run) -> None:
    status, out, _ = promptplex("doctor")
    assert status == 0
    assert "matmul bfloat16 gflop per s" in out
    assert "model:" not in out
    assert "gpu:" in out
    assert "cuda of torch" in out


def test_weights_that_there_are_none_of(promptplex: Run) -> None:
    status, _, err = promptplex("doctor", "--weights", "int4")
    assert status != 0
    assert "choose auto or int8" in err


def test_version(promptplex: Run) -> None:
    from app import __version__

    assert promptplex("--version")[:2] == (0, f"promptplex {__version__}\n")
