"""`promptplex eval` against a real server: what it says was generated is what `/generate` says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.scoring.self_consistency import majority
from tests.api.server import hosted

Run = Callable[..., tuple[int, str, str]]


def ask(url: str, **body: Any) -> str:
    answer = httpx2.post(f"{url}/generate", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generated_text"])


@pytest.fixture(scope="module")
def task(server_url: str, save_peft: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task with two versions; `live` is the second."""
    for seed in (1, 2):
        directory = save_peft(tmp_path_factory.mktemp("prompt"), seed=seed)
        files = {
            "prompt": ("p.safetensors", (directory / "adapter_model.safetensors").read_bytes()),
            "config": ("c.json", (directory / "adapter_config.json").read_bytes()),
        }
        url = f"{server_url}/tasks/evaluated/versions"
        assert httpx2.post(url, files=files, trust_env=False, timeout=60).status_code == 201
    return "evaluated"


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_scores_and_outputs_are_those_of_the_server(
    server_url: str, task: str, promptplex: Run, tmp_path: Path
) -> None:
    parameters = {"max_new_tokens": 5}
    texts = [f"text number {number}" for number in range(12)]
    generated = [ask(server_url, task_id=task, inputs=text, parameters=parameters) for text in texts]
    wrong = {0, 5}
    lines = [
        {"inputs": text, "expected": "no" if number in wrong else output}
        for number, (text, output) in enumerate(zip(texts, generated, strict=True))
    ]
    data, out = write(tmp_path / "data.jsonl", *lines), tmp_path / "report.json"
    status, shown, _ = promptplex(
        *("eval", "--task", task, "--data", data, "--out", str(out), "--max-new-tokens", "5"),
        *("--server", server_url),
    )
    assert status == 0
    assert "evaluated@2" in shown
    assert "10 of 12" in shown
    report = json.loads(out.read_text())
    assert [line["generated"] for line in report["outputs"]] == generated
    assert {number for number, line in enumerate(report["outputs"]) if not line["exact"]} == wrong
    assert report["scores"]["exact"]["count"] == 10
    assert report["version_digest"].startswith("sha256:")


def test_a_version_and_the_base_answer_differently(
    server_url: str, task: str, promptplex: Run, tmp_path: Path
) -> None:
    data = write(tmp_path / "data.jsonl", {"inputs": "some words", "expected": "x"})
    outputs = {}
    for name, flags in {"base": [], "first": ["--task", f"{task}@1"], "live": ["--task", task]}.items():
        out = tmp_path / f"{name}.json"
        promptplex("eval", *flags, "--data", data, "--out", str(out), "--server", server_url)
        outputs[name] = json.loads(out.read_text())["outputs"][0]["generated"]
    assert outputs["base"] == ask(server_url, inputs="some words")
    assert outputs["first"] == ask(server_url, inputs="some words", task_id=f"{task}@1")
    assert len(set(outputs.values())) == 3


def test_a_template_puts_inputs_into_words(server_url: str, promptplex: Run, tmp_path: Path) -> None:
    data, out = write(tmp_path / "data.jsonl", {"inputs": "it", "expected": "x"}), tmp_path / "report.json"
    promptplex("eval", "--template", "Say {text}:", "--data", data, "--out", str(out), "--server", server_url)
    assert json.loads(out.read_text())["outputs"][0]["generated"] == ask(server_url, inputs="Say it:")


def test_refused_requests_count_as_wrong_and_fail_the_command(
    server_url: str, task: str, promptplex: Run, tmp_path: Path
) -> None:
    good = {"inputs": "fine", "expected": ask(server_url, task_id=task, inputs="fine")}
    data = write(tmp_path / "data.jsonl", good, {"inputs": "too long " * 2000, "expected": "x"})
    status, shown, errors = promptplex("eval", "--task", task, "--data", data, "--server", server_url)
    assert status == 1
    assert "1 of 2" in shown
    assert "1 requests were refused" in errors


@pytest.mark.parametrize(
    ("reference", "message"),
    [("nothing", "nothing"), ("evaluated@9", "no version 9"), ("evaluated@canary", "no alias 'canary'")],
)
def test_who_cannot_be_asked_is_explained(
    reference: str, message: str, server_url: str, task: str, promptplex: Run, tmp_path: Path
) -> None:
    data = write(tmp_path / "data.jsonl", {"inputs": "x", "expected": "y"})
    status, _, errors = promptplex("eval", "--task", reference, "--data", data, "--server", server_url)
    assert status == 1
    assert message in errors


def test_a_server_that_is_not_there(promptplex: Run, unused_port: int, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", {"inputs": "x", "expected": "y"})
    url = f"http://127.0.0.1:{unused_port}"
    status, _, errors = promptplex("eval", "--task", "any", "--data", data, "--server", url)
    assert status == 1
    assert "promptplex serve" in errors


def test_choices_are_calibrated_and_drawn(server_url: str, promptplex: Run, tmp_path: Path) -> None:
    part = {"template": "the film was {text}", "choices": ["good", {"value": "bad", "text": "cold"}]}
    url = f"{server_url}/tasks/calibrated/versions"
    files = {"task": (None, json.dumps(part))}
    assert httpx2.post(url, files=files, trust_env=False, timeout=60).status_code == 201
    lines = [{"inputs": f"item {number}", "expected": ("good", "bad")[number % 2]} for number in range(10)]
    data, out, plot = write(tmp_path / "data.jsonl", *lines), tmp_path / "o.json", tmp_path / "plot.svg"
    flags = ("--task", "calibrated", "--data", data, "--max-new-tokens", "2", "--server", server_url)
    status, shown, _ = promptplex("eval", *flags, "--out", str(out), "--plot", str(plot))
    assert status == 0
    report = json.loads(out.read_text())
    hits, squares = 0, 0.0
    for line, output in zip(lines, report["outputs"], strict=True):
        body = {"inputs": line["inputs"], "task_id": "calibrated", "parameters": {"choices": True}}
        answer = httpx2.post(f"{server_url}/generate", json=body, trust_env=False, timeout=60).json()[
            "choice"
        ]
        probabilities = {each["value"]: each["probability"] for each in answer["probabilities"]}
        assert output["probabilities"] == pytest.approx(probabilities)
        hits += answer["value"] == line["expected"]
        squares += 2 * (1 - probabilities[line["expected"]]) ** 2  # two choices err by the same
    assert report["scores"]["choices_accuracy"]["count"] == hits
    assert report["scores"]["brier"]["value"] == pytest.approx(squares / 10, abs=1e-4)
    by_text = write(tmp_path / "by-text.jsonl", *(line | {"expected": "cold"} for line in lines))
    assert (
        promptplex("eval", *flags[:2], "--data", by_text, *flags[4:], "--out", str(tmp_path / "t.json"))[0]
        == 0
    )
    [first, *_] = json.loads((tmp_path / "t.json").read_text())["outputs"]
    good, bad = (report["outputs"][0]["probabilities"][name] for name in ("good", "bad"))
    assert first["probabilities"] == pytest.approx({"good": good, "cold": bad})
    assert {"ece_equal_width", "ece_adaptive", "bins"} == report["calibration"].keys()
    assert "15 bins of equal width" in shown
    assert b"<svg" in plot.read_bytes()


def test_what_is_no_choice_is_not_calibrated(
    server_url: str, task: str, promptplex: Run, tmp_path: Path
) -> None:
    data = write(tmp_path / "data.jsonl", {"inputs": "x", "expected": "y"})
    plot = ("--plot", str(tmp_path / "plot.png"))
    flags = ("--task", task, "--data", data, "--server", server_url)
    status, _, err = promptplex("eval", *flags, *plot)
    assert (status, "here there are none" in err) == (1, True)
    part = {"template": "the film was {text}", "choices": ["good", "bad"]}
    url = f"{server_url}/tasks/choosing/versions"
    httpx2.post(url, files={"task": (None, json.dumps(part))}, trust_env=False, timeout=60)
    flags = ("--task", "choosing", "--data", data, "--server", server_url)
    status, shown, err = promptplex("eval", *flags)
    assert (status, "none of the task's choices" in err) == (0, True)
    assert "choices accuracy" not in shown
    assert promptplex("eval", *flags, *plot)[0] == 1


def test_a_temperature_is_fitted_on_held_out_lines(server_url: str, promptplex: Run, tmp_path: Path) -> None:
    part = {"template": "it is {text}", "choices": ["film", "food"], "calibration": {"temperature": 0.5}}
    url = f"{server_url}/tasks/too-sure/versions"
    assert (
        httpx2.post(url, files={"task": (None, json.dumps(part))}, trust_env=False, timeout=60).status_code
        == 201
    )
    lines = [{"inputs": f"number {number}", "expected": ("film", "food")[number % 2]} for number in range(16)]
    data, out = write(tmp_path / "data.jsonl", *lines), tmp_path / "o.json"
    flags = ("--task", "too-sure", "--max-new-tokens", "1", "--server", server_url, "--fit-calibration")
    status, shown, err = promptplex("eval", *flags, "--data", data, "--out", str(out))
    assert status == 0, err
    fitted = json.loads(out.read_text())["fitted"]
    temperature = fitted["calibration"]["temperature"]
    assert temperature > 0.5, "labels at random call for less certainty"
    assert f"--calibration-temperature {temperature:g}" in shown
    assert fitted["after"]["nll"] < fitted["before"]["nll"]
    few = write(tmp_path / "few.jsonl", *lines[:4])
    status, _, err = promptplex("eval", *flags, "--data", few)
    assert (status, "at least 10 lines" in err) == (1, True)


def test_votes_are_counted_for_every_number_of_ballots(
    server_url: str, promptplex: Run, tmp_path: Path
) -> None:
    part = {
        "template": "{text}",
        "reasoning": {"answer_after": "answer:", "effort": {"low": 2}},
        "defaults": {"max_new_tokens": 12, "reasoning_effort": "low"},
    }
    url = f"{server_url}/tasks/voted/versions"
    answer = httpx2.post(url, files={"task": (None, json.dumps(part))}, trust_env=False, timeout=60)
    assert answer.status_code == 201, answer.text
    lines = [{"inputs": f"film {number}", "output": "x; answer: the", "answer": "the"} for number in range(4)]
    data, out, plot = write(tmp_path / "data.jsonl", *lines), tmp_path / "o.json", tmp_path / "curve.svg"
    flags = ("eval", "--task", "voted", "--data", data, "--out", str(out), "--server", server_url)
    status, shown, err = promptplex(*flags, "--vote", "5", "--plot", str(plot))
    assert status == 0, err
    report = json.loads(out.read_text())
    assert [point["ballots"] for point in report["self_consistency"]] == [1, 3, 5]
    assert "ballots" in shown
    assert b"<svg" in plot.read_bytes()
    for number, output in enumerate(report["outputs"]):
        assert (output["expected"], len(output["ballots"])) == ("the", 5)
        body = {
            "task_id": "voted",
            "inputs": f"film {number}",
            "parameters": {"vote": {"n": 5}, "seed": number},
        }
        said = httpx2.post(f"{server_url}/generate", json=body, trust_env=False, timeout=60).json()
        assert output["generated"] == said["generated_text"]
        assert majority(output["ballots"]) == " ".join(said["generated_text"].split())
    assert promptplex(*flags, "--vote", "1")[0] == 0
    assert "self_consistency" not in json.loads(out.read_text())


def test_the_forms_of_training_data_are_held_out_files_too(
    server_url: str, promptplex: Run, tmp_path: Path
) -> None:
    said = ask(server_url, inputs="the film", parameters={"max_new_tokens": 3})
    files = {
        "labels.jsonl": json.dumps({"text": "the film", "label": said}),
        "table.csv": f'inputs,output\n"the film","{said.replace(chr(34), chr(34) * 2)}"',
        "whole.jsonl": json.dumps({"prompt": "the film", "completion": said}),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n", newline="")
        flags = ("--data", str(tmp_path / name), "--max-new-tokens", "3", "--server", server_url)
        status, shown, err = promptplex("eval", *flags)
        assert (status, "1 of 1" in shown) == (0, True), err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "it holds no examples"),
        ('{"inputs": "x", "expected": "y"}\n{', "line 2"),
        ('{"inputs": "x"}', "output is missing"),
        ('{"inputs": "x", "expected": "y", "label": "z"}', "unknown field"),
    ],
)
def test_bad_data_is_told_in_one_line(content: str, message: str, promptplex: Run, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    for command in (("eval",), ("compare", "any@candidate")):
        status, out, err = promptplex(*command, "--data", str(tmp_path / "data.jsonl"))
        assert (status, out) == (1, "")
        assert err.startswith("error: data.jsonl")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "command", [("eval", "--plot", "{0}/p.svg"), ("compare", "a@b", "--out", "{0}/o.json")]
)
def test_a_missing_directory_is_noticed_before_anything_is_asked(
    command: tuple[str, ...], promptplex: Run, tmp_path: Path
) -> None:
    data = write(tmp_path / "data.jsonl", {"inputs": "x", "expected": "y"})
    arguments = [argument.format(tmp_path / "none") for argument in command]
    status, _, err = promptplex(*arguments, "--data", data)
    assert (status, "there is no directory" in err) == (1, True)


@pytest.mark.slow
def test_chats_are_answered_with_the_chat_template(base: Path, promptplex: Run, tmp_path: Path) -> None:
    model = tmp_path / "chatty"
    shutil.copytree(base, model)
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    )
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with hosted(model=str(model), store=tmp_path / "store", dtype="float32") as url:
        rendered = "user: the film\nassistant: good\nuser: the food\nassistant:"
        said = ask(url, inputs=rendered, parameters={"max_new_tokens": 4})
        messages = [
            {"role": "user", "content": "the film"},
            {"role": "assistant", "content": "good"},
            {"role": "user", "content": "the food"},
            {"role": "assistant", "content": said},
        ]
        data, out = write(tmp_path / "data.jsonl", {"messages": messages}), tmp_path / "o.json"
        flags = ("--data", data, "--out", str(out), "--max-new-tokens", "4", "--server", url)
        assert promptplex("eval", *flags)[0] == 0
        [output] = json.loads(out.read_text())["outputs"]
        assert output["generated"] == said
        assert output["inputs"] == messages[:-1]
        status, _, err = promptplex("eval", *flags, "--template", "Say {text}")
        assert (status, "--template goes with inputs" in err) == (1, True)
