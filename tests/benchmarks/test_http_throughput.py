"""The measurement of what HTTP costs runs, and every answer is checked on the way."""

import json
from pathlib import Path

import pytest

from benchmarks.http_throughput import ENGINE, STREAM, WHOLE, byte_level_bpe, main, vocabulary


def test_a_text_of_words_has_just_their_ids() -> None:
    tokens = vocabulary(2000)
    assert len(set(tokens)) == 2000
    tokenizer = byte_level_bpe(tokens)
    ids = list(range(27, 2000, 7))
    text = "".join(tokens[id_].replace("Ġ", " ") for id_ in ids)
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text


def test_all_ways_do_the_same_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    main(
        [
            *("--shape", "tiny", "--rounds", "2", "--requests", "16", "--new-tokens", "32"),
            *("--out", str(out)),
        ]
    )
    report = json.loads(out.read_text())
    assert set(report["ways"]) == {ENGINE, WHOLE, STREAM}
    for way in report["ways"].values():
        assert way["tokens_per_second"]["median"] > 0
        assert way["server_cpu_ms_per_token"]["median"] > 0
    assert "| streams |" in capsys.readouterr().out
