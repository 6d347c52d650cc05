"""The benchmark of encoder-decoders runs: all sides do the same work, and those that can't run are named."""

import json
from pathlib import Path

import pytest

from benchmarks.encoder_decoder.__main__ import main
from benchmarks.encoder_decoder.compiled_sides import RUNTIMES
from benchmarks.encoder_decoder.work import SHAPES, SourceWork

TINY = ["--tasks", "2", "--requests", "4", "--source-tokens", "9", "--new-tokens", "3", "--rounds", "1"]


def test_every_side_takes_part_and_those_missing_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    flags = [
        "--shapes",
        "tiny-bart",
        "--beams",
        "1,2",
        "--peers",
        "peft-single,peft-grouped,ctranslate2-int8",
    ]
    main([*TINY, *flags, "--compiled-python", "/bin/false", "--out", str(out)])
    found = json.loads(out.read_text())["shapes"]["tiny-bart"]
    prompted = [
        f"{name} ({decoding}, p=20, 2 tasks)"
        for name in ("Promptplex", "PEFT, one at a time", "PEFT, grouped by task")
        for decoding in ("greedy", "2 beams")
    ]
    assert set(found["sides"]) == set(prompted)
    assert {label: set(ratios) for label, ratios in found["ratios"].items()} == {
        label: {"PEFT, one at a time", "PEFT, grouped by task"} for label in prompted[:2]
    }
    assert list(found["skipped"]) == [RUNTIMES["ctranslate2-int8"].name]
    assert "left out: CTranslate2 int8" in capsys.readouterr().out


def test_unknown_sides_and_shapes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--peers", "peft", "--shapes", "t5-huge"])
    assert "unknown: peft, t5-huge" in capsys.readouterr().err


def test_beams_need_rows_and_slots_of_their_own() -> None:
    greedy, beams = (SourceWork(shape=SHAPES["tiny-t5"], num_beams=number) for number in (1, 4))
    assert (greedy.rows, beams.rows) == (32, 128)
    assert beams.slots - greedy.slots == 3 * 32 * greedy.new_tokens
    assert greedy.label != beams.label
    assert greedy.promptless_label != beams.promptless_label
