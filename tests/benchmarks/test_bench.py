"""The benchmark runs, all sides do the same work, and its figures follow from what it measured."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.limits import Hardware, ModelCost, decode_step, prefill
from benchmarks.machine import kinds_supported
from benchmarks.peft_sides import PeftOneAtATime, PeftPrompts
from benchmarks.rounds import Record, ratio
from benchmarks.spread import Spread
from benchmarks.tables import tables
from benchmarks.work import SHAPES, Work, make_asks, random_model, random_prompts
from benchmarks.works import WORKS, tiny, work_named

ROOT = Path(__file__).parents[2]
TINY = ["--tiny", "--rounds", "2", "--compiled-python", "/bin/false", "--vllm-python", "nowhere/python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two runs of the command wrote their report and plots; the second one adds a work."""
    folder = tmp_path_factory.mktemp("bench")
    flags = [*TINY, "--out", str(folder / "report.json"), "--plots", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.rounds.measure_hardware", lambda: Hardware(1e10, 1e11))  # saves seconds
        main([*flags, "--works", "rows-1,rows-32,top-p,choices", "--peers", "vllm,openvino,peft,generate"])
        main([*flags, "--works", "t5-beams", "--peers", "ctranslate2"])
    return folder


@pytest.fixture(scope="module")
def works(folder: Path) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """The report's."""
    found: dict[str, dict[str, dict[str, dict[str, object]]]] = json.loads(
        (folder / "report.json").read_text()
    )["works"]
    return found


def test_every_side_takes_part_in_every_round(works: dict[str, dict[str, dict[str, object]]]) -> None:
    assert list(works) == ["rows-1", "rows-32", "top-p", "choices", "t5-beams"]
    peft, generate = {"PEFT, one at a time", "PEFT, grouped by task"}, "transformers generate, no prompts"
    for name in ("rows-1", "rows-32", "choices"):
        assert set(works[name]["ratios"]) == peft | {generate}
        assert set(works[name]["sides"]) == peft | {generate, "Promptplex"}
        assert all(len(side["seconds"]) == 2 for side in works[name]["sides"].values())
    assert all(set(works[name]["sides"]) == {"Promptplex"} for name in ("top-p", "t5-beams"))
    assert set(works["rows-32"]["beside"]) == {"one-task"}
    assert set(works["top-p"]["beside"]) == {"rows-32"}
    assert works["rows-32"]["limits"]["decode_step_measured_seconds"] > 0
    assert works["rows-32"]["waiting_sides_cpus"] >= 0


def test_sides_that_can_not_run_are_left_out_with_the_reason(
    works: dict[str, dict[str, dict[str, str]]], folder: Path
) -> None:
    left_out = works["rows-1"]["left_out"]
    assert set(left_out) == {"vllm", "openvino"}
    assert "nowhere/python can't be run" in left_out["vllm"]
    assert "--vllm-python" in left_out["vllm"]
    assert "can't import openvino_genai" in left_out["openvino"]
    assert set(works["t5-beams"]["left_out"]) == {"ctranslate2"}


def test_sides_with_the_same_prompts_say_the_same(works: dict[str, dict[str, dict[str, object]]]) -> None:
    # bf16 on random weights: ties may break apart
    agreement = works["rows-1"]["agreement"]["PEFT, grouped by task"]
    assert agreement["first_token"] >= 0.75
    assert not works["choices"]["agreement"]


def test_the_table_has_a_row_for_each_work_and_the_plots_are_svg(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    table = tables(report)
    assert re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) == list(report["works"])
    assert "our one-task" in table
    for name in ("throughput.svg", "rows.svg"):
        text = "".join(ElementTree.parse(folder / name).getroot().itertext())
        assert "tokens per second" in text


def test_one_at_a_time_takes_requests_of_several_tasks() -> None:
    work = Work(shape=SHAPES["tiny"], tasks=5, requests=20)
    asks = make_asks(work)
    model = random_model(work.shape)
    peft = PeftPrompts(model)
    peft.add(work, random_prompts(model, work))
    sample = PeftOneAtATime(peft, work).sample(asks)
    assert len({ask.task for ask in sample}) == len(sample) == 2


def test_every_task_has_a_prompt_of_its_own() -> None:
    work = Work(shape=SHAPES["tiny"], tasks=3, requests=3, virtual_tokens=4)
    prompts = random_prompts(random_model(work.shape), work)
    assert [tuple(rows.shape) for rows in prompts] == [(4, 64)] * 3
    assert not torch.equal(prompts[0], prompts[1])


def test_named_works_compare_with_named_works() -> None:
    for entry in WORKS.values():
        for other in entry.beside:
            assert work_named(other).shape == entry.work.shape
        assert tiny(entry.work).shape.hidden == 64


def test_ratios_are_taken_within_a_round() -> None:
    ours, theirs = Record(100, 1, seconds=[1.0, 2.0, 4.0]), Record(50, 1, seconds=[1.0, 2.0, 1.0])
    assert ratio(ours, theirs) == Spread(2.0, 1.25, 2.0)


def test_the_limits_are_bandwidth_or_arithmetic() -> None:
    work = Work(shape=SHAPES["tiny"], tasks=2, requests=4, virtual_tokens=10, prompt_tokens=8)
    cost = ModelCost(parameters=900, head_parameters=100)
    kappa = 2 * 2 * 2 * 16 * 2  # K and V, layers, heads, width, bytes
    read = 1000 * 2 + (2 * 10 + 4 * 8) * kappa
    assert decode_step(Hardware(1.0, 1e9), cost, work, 8) == read
    assert decode_step(Hardware(1e9, 1.0), cost, work, 8) == 2 * 1000 * 4
    assert prefill(Hardware(1e9, 1.0), cost, work) == 2 * (900 * 4 * 8 + 100 * 4)


def test_the_kind_of_a_processor_is_what_makes_bf16_fast() -> None:
    assert kinds_supported("avx2 avx512f avx512_bf16 amx_tile amx_bf16")[0] == "cpu-amx"
    assert kinds_supported("avx2 avx512f avx512_bf16")[0] == "cpu-avx512-bf16"
    assert kinds_supported("neon") == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers", "nobody"], "choose from"),
        (["--works", "rows-3"], "choose from"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_what_is_not_known_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("report", sorted((ROOT / "benchmarks" / "results").glob("cpu-*.json")))
def test_the_readme_quotes_the_shipped_reports(report: Path) -> None:
    assert tables(json.loads(report.read_text())) in (ROOT / "README.md").read_text()
