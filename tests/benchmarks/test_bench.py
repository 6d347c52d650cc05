"""The benchmark runs, all sides do the same work, and its figures follow from what it measured."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.limits import Hardware, ModelCost, decode_step, prefill
from benchmarks.peft_sides import PeftOneAtATime, PeftPrompts
from benchmarks.report import markdown
from benchmarks.rounds import Record, ratio
from benchmarks.spread import Spread
from benchmarks.work import SHAPES, Work, make_asks, random_model, random_prompts

TINY = ["--shape", "tiny", "--rounds", "2", "--requests", "8", "--prompt-tokens", "16", "--new-tokens", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run of the command wrote its report and plots."""
    folder = tmp_path_factory.mktemp("bench")
    flags = ["--tasks", "4", "--virtual-tokens", "0,20", "--peers", "peft-single,peft-grouped,static"]
    main([*TINY, *flags, "--out", str(folder / "report.json"), "--plots", str(folder)])
    return folder


def test_every_side_takes_part_in_every_round(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert set(report["sides"]) == {
        "Promptplex (p=0, 4 tasks)",
        "Promptplex (p=0, 1 task)",
        "Promptplex (p=20, 4 tasks)",
        "Promptplex (p=20, 1 task)",
        "PEFT, one at a time (p=20, 4 tasks)",
        "PEFT, grouped by task (p=20, 4 tasks)",
        "transformers generate, no prompts (8 requests)",
    }
    assert all(len(side["seconds"]) == 2 for side in report["sides"].values())
    mine = "Promptplex (p=20, 4 tasks)"
    assert set(report["ratios"][mine]) == {
        "PEFT, one at a time",
        "PEFT, grouped by task",
        "transformers generate, no prompts",
    }
    assert set(report["mixing"]) == {mine, "Promptplex (p=0, 4 tasks)"}
    assert report["limits"][mine]["decode_step_measured_seconds"] > 0


def test_sides_with_the_same_prompts_say_the_same(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    # bf16 on random weights: ties may break apart
    assert report["agreement"]["Promptplex (p=20, 4 tasks)"]["PEFT, grouped by task"]["first_token"] >= 0.75
    without = report["agreement"]["Promptplex (p=0, 4 tasks)"]
    assert without["transformers generate, no prompts"]["first_token"] >= 0.75


def test_the_plots_are_svg(folder: Path) -> None:
    for name in ("throughput.svg", "sweep.svg"):
        text = "".join(ElementTree.parse(folder / name).getroot().itertext())
        assert "tokens per second" in text


def test_one_at_a_time_takes_a_request_of_each_task() -> None:
    work = Work(shape=SHAPES["tiny"], tasks=5, requests=20)
    asks = make_asks(work)
    model = random_model(work.shape)
    peft = PeftPrompts(model)
    peft.add(work, random_prompts(model, work))
    sample = PeftOneAtATime(peft, work).sample(asks)
    assert len(sample) == 8
    assert {ask.task for ask in sample} == set(range(5))


def test_every_task_has_a_prompt_of_its_own() -> None:
    work = Work(shape=SHAPES["tiny"], tasks=3, requests=3, virtual_tokens=4)
    prompts = random_prompts(random_model(work.shape), work)
    assert [tuple(rows.shape) for rows in prompts] == [(4, 64)] * 3
    assert not torch.equal(prompts[0], prompts[1])


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers", "nobody"], "choose from"),
        (["--shape", "huge"], "choose from"),
        (["--vllm-python", "nowhere/python"], "there is no nowhere/python"),
    ],
)
def test_what_is_not_known_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_readme_quotes_the_shipped_report() -> None:
    root = Path(__file__).parents[2]
    report = json.loads((root / "benchmarks" / "results" / "headline.json").read_text())
    assert markdown(report, "Promptplex (p=20, 8 tasks)") in (root / "README.md").read_text()
