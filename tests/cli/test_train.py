"""`promptplex train`: one command from a file to a candidate; a failure is one line, and leaves nothing."""

import contextlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from typer.main import get_command

from app.cli import cli, train
from app.cli.training.interruption import Interruption
from app.cli.training.options import as_held_out
from app.serving.publishing.task_settings import parse_task
from app.text.message import Message
from app.training.examples import Example
from app.training.readers import read_examples
from app.training.run_directory import RunState, held, read_run
from app.training.settings import SelfStudySettings, TrainingSettings
from tests.bases import save_tiny_llama, train_tokenizer
from tests.waiting import PATIENCE

Run = Callable[..., tuple[int, str, str]]
TINY = ("--steps", "4", "--eval-every", "2", "--batch-size", "4", "--num-virtual-tokens", "3", "--quiet")
RESULTS = {"metrics.json", "prompt.safetensors", "report.html", "run.json", "task.json", "test.jsonl"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty lines of two labels."""
    path = tmp_path_factory.mktemp("data") / "moods.jsonl"
    lines = [
        {"text": f"the {what} was {how} on day {day}", "label": label}
        for day in range(10)
        for what in ("film", "food")
        for how, label in (("great", "up"), ("cold", "down"))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(promptplex: Run, base: Path, unused_port: int) -> Run:
    """Train on the tiny base, with no server there."""

    def run(*arguments: str) -> tuple[int, str, str]:
        nowhere = ("--server", f"http://127.0.0.1:{unused_port}")
        return promptplex("train", "--task", "moods", "--model", str(base), *TINY, *nowhere, *arguments)

    return run


def test_each_setting_has_a_flag_in_the_help() -> None:
    flags = inspect.signature(train.train).parameters
    fields = TrainingSettings.model_fields | SelfStudySettings.model_fields
    assert set(fields) <= set(flags)
    command = get_command(cli).commands["train"]  # type: ignore[attr-defined]
    shown = {parameter.name: parameter for parameter in command.params}
    for name, field in fields.items():
        assert shown[name].opts == [f"--{name.replace('_', '-')}"]
        assert field.description in shown[name].help
        assert shown[name].rich_help_panel in ("Prompt", "Optimization", "Dev set", "Cartridge")


def test_a_run_leaves_what_push_takes(run: Run, promptplex: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, shown, err = run(str(data), "--out", str(out), "--instruction", "up or down?")
    assert status == 0, err
    assert "moods: prefix of 3 virtual tokens" in shown
    assert f"publish it: promptplex push {out} --task moods --alias candidate" in shown
    assert set(os.listdir(out)) >= RESULTS
    assert not (out / ".serving").exists()
    view = read_run(out)
    assert view.status.state is RunState.DONE
    assert len(view.history.steps) == 4
    assert [look.step for look in view.history.looks] == [0, 2, 4]
    task = json.loads((out / "task.json").read_bytes())
    provenance = parse_task(task).provenance
    assert task["template"] == "{text}\n"
    assert task["choices"] == ["down", "up"]
    assert provenance["training"]["method"] == "prefix"
    assert provenance["training"]["base_fingerprint"] == view.status.base_fingerprint
    assert provenance["training"]["curves"]["loss"]["steps"] == [1, 2, 3, 4]
    metrics = json.loads((out / "metrics.json").read_bytes())
    assert list(metrics["test"]) == ["trained prompt", "instruction", "bare base"]
    assert metrics["data"]["num_examples"]["test"] == len(read_examples(out / "test.jsonl"))
    assert provenance["metrics"]["test accuracy"] == metrics["test"]["trained prompt"]["accuracy"]["share"]
    assert metrics["main_metric"] in metrics["test"]["trained prompt"]
    assert 0 <= metrics["test"]["bare base"]["choices_accuracy"]["share"] <= 1
    store = ("--store", str(tmp_path / "store"))
    status, shown, err = promptplex("push", str(out), "--task", "moods", "--alias", "candidate", *store)
    assert (status, err) == (0, "")
    _, shown, _ = promptplex("show", "moods", *store)
    assert "alias    candidate -> 1" in shown
    assert "trained: prefix, step" in shown


def test_a_task_with_a_program_is_trained_on_what_serving_reads(
    run: Run, promptplex: Run, data: Path, tmp_path: Path
) -> None:
    """Its completions are measured, not its votes; what is pushed has it all."""
    task, out = tmp_path / "given.json", tmp_path / "run"
    given = {
        "template": "{text}\n{options}\n",
        "choices": ["down", "up"],
        "paraphrases": ["{text}?\n{options}\n"],
        "few_shot": [{"inputs": "the food", "output": "up"}],
        "vote": {"n": 3},
        "defaults": {"max_new_tokens": 2, "paraphrase": 0},
    }
    task.write_text(json.dumps(given))
    status, _, err = run(str(data), "--out", str(out), "--task-file", str(task))
    assert status == 0, err
    written = json.loads((out / "task.json").read_bytes())
    assert {name: written[name] for name in given} == given
    assert "the food?\n- down\n- up\nup\n\n" in (out / "report.html").read_text()
    store = ("--store", str(tmp_path / "store"))
    assert promptplex("push", str(out), "--task", "moods", *store)[0] == 0


def test_choices_that_the_data_does_not_expect_are_not_scored(run: Run, data: Path, tmp_path: Path) -> None:
    """Such as those of the live version, which a run over HTTP takes over."""
    task, out = tmp_path / "given.json", tmp_path / "run"
    task.write_text(json.dumps({"choices": ["good", "bad"], "defaults": {"max_new_tokens": 1}}))
    given = (str(data), "--out", str(out), "--task-file", str(task), "--test-share", "0")
    status, _, err = run(*given, "--max-new-tokens", "7")
    assert status == 0, err
    metrics = json.loads((out / "metrics.json").read_bytes())
    assert metrics["main_metric"] != "choices_accuracy"
    assert metrics["test"] == {}
    written = json.loads((out / "task.json").read_bytes())
    assert {name.split()[0] for name in written["metrics"]} == {"dev"}
    assert written["defaults"] == {"max_new_tokens": 7}


def test_an_input_that_leaves_no_room_for_the_longest_choice_is_refused_before_training(
    run: Run, tmp_path: Path
) -> None:
    """It has room for its own answer, but all choices are scored after it."""
    lines = [{"text": f"film {day}", "label": "a" if day % 2 else "the area was cold"} for day in range(40)]
    lines.append({"text": "food " * 20, "label": "a"})
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = train_tokenizer()
    source, longest = (
        len(tokenizer(text).input_ids) for text in (f"{lines[-1]['text']}\n", lines[0]["label"])
    )
    scored = longest + 2  # with EOS, and a token that is generated
    needed = 3 + source + scored
    status, _, err = run(str(data), "--out", str(out), "--max-context", str(needed - 1))
    assert status == 1
    assert f"3 learned + {source} of the input + {scored} of the answer" in err
    assert not out.exists()
    status, _, err = run(str(data), "--out", str(out), "--max-context", str(needed))
    assert status == 0, err


def test_choices_go_by_the_texts_that_the_data_expects(run: Run, data: Path, tmp_path: Path) -> None:
    task, out = tmp_path / "given.json", tmp_path / "run"
    task.write_text(
        json.dumps({"choices": [{"value": each, "text": each.lower()} for each in ("UP", "DOWN")]})
    )
    status, _, err = run(str(data), "--out", str(out), "--task-file", str(task))
    assert status == 0, err
    metrics = json.loads((out / "metrics.json").read_bytes())
    assert metrics["main_metric"] == "choices_accuracy"


def test_the_same_seed_gives_the_same_prompt(run: Run, data: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        assert run(str(data), "--out", str(tmp_path / name), "--method", "prompt")[0] == 0
    one, other = ((tmp_path / name / "prompt.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_sweep_keeps_the_best_candidate(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, _, err = run(str(data), "--out", str(out), "--sweep", "lr=1e-9,0.05 length=2")
    assert status == 0, err
    trials = json.loads((out / "metrics.json").read_bytes())["trials"]
    assert [trial["chosen"] for trial in trials] == [False, False, True]
    assert "Sweep" in (out / "report.html").read_text()
    assert json.loads((out / "task.json").read_bytes())["training"]["settings"]["num_virtual_tokens"] == 2


def test_a_prompt_may_start_from_another_ones(run: Run, promptplex: Run, data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert run(str(data), "--out", str(tmp_path / "first"))[0] == 0
    assert promptplex("push", str(tmp_path / "first"), "--task", "first", "--store", str(store))[0] == 0
    for start in ("first@1", str(tmp_path / "first")):
        out = tmp_path / start.replace("/", "-")
        status, _, err = run(str(data), "--out", str(out), "--init-from", start, "--store", str(store))
        assert status == 0, err
    status, _, err = run(
        str(data), "--out", str(tmp_path / "x"), "--init-from", "none@1", "--store", str(store)
    )
    assert status == 1
    assert err.splitlines()[-1] == "error: There is no task 'none'"
    assert not (tmp_path / "x").exists()


def test_a_directory_that_is_not_empty_is_not_overwritten(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(str(data), "--out", str(out))[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    status, _, err = run(str(data), "--out", str(out))
    assert status == 1
    assert "isn't empty" in err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert run(str(data), "--out", str(out), "--resume")[0] == 0
    assert (out / "prompt.safetensors").read_bytes() == before["prompt.safetensors"]
    status, _, err = run(str(data), "--out", str(out), "--resume", "--seed", "1")
    assert status == 1
    assert "seed was 0 and is now 1" in err
    assert read_run(out).status.state is RunState.DONE
    assert (out / "run.json").read_bytes() != before["run.json"], "it was resumed once, above"
    status, _, err = run(str(data), "--out", str(out), "--resume", "--init-from", str(out))
    assert status == 1
    assert "the prompt to start from was nothing and is now" in err
    status, _, err = run(str(data), "--out", str(tmp_path / "none"), "--resume")
    assert status == 1
    assert "to resume" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "-1"], "--learning-rate: "),
        (["--steps", "0", "--seed", "-3"], "--steps: "),
        (["--template", "no field"], "no field"),
        (["--template", "{name}: {food}"], "fields"),
        (["--sweep", "nonsense=1"], "nonsense"),
        (["--method", "prefix", "--network", "lstm"], "lstm"),
        (["--init", "labels", "--method", "p-tuning"], "init"),
        (["--num-virtual-tokens", "4096"], "no room for a text"),
        (["--task-file", "nowhere.json"], "nowhere.json"),
        (["--dtype", "float8"], "--dtype"),
        (["--method", "multitask"], "two or more tasks"),
        (["--method", "cartridge"], "--document FILE in place of data"),
        (["--document", "nowhere.txt"], "for --method cartridge"),
        (["--num-questions", "20"], "for --method cartridge"),
        (["--num-questions", "0"], "--num-questions: "),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    run: Run, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, out, err = run(str(data), "--out", str(tmp_path / "runs" / "run"), *arguments)
    assert (status, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "runs" / "run").exists()


def test_data_that_is_wrong_is_told_before_the_base_is_loaded(run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    status, _, err = run(str(bad), "--out", str(tmp_path / "run"), "--model", "nowhere")
    assert status == 1
    assert "bad.jsonl, line 2" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("form", ["messages", "prompt", "fields"])
def test_data_of_other_forms(run: Run, tmp_path: Path, form: str) -> None:
    def line(number: int) -> dict[str, object]:
        asked, answer = f"the film {number}", f"great {number % 3}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return {
            "messages": {"messages": turns},
            "prompt": {"prompt": asked, "completion": answer},
            "fields": {"inputs": {"name": asked}, "output": answer, "answer": str(number % 3)},
        }[form]

    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(line(number)) + "\n" for number in range(40)))
    status, _, err = run(str(data), "--out", str(out))
    assert status == 0, err
    held_out = read_examples(out / "test.jsonl")
    assert all(example.output.startswith("great") for example in held_out)
    assert bool(held_out[0].messages) is (form == "messages")


def test_the_missing_extra_is_named(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    status, _, err = run(str(data))
    assert (status, err) == (1, "error: training needs matplotlib; run: pip install 'promptplex[train]'\n")


def test_push_makes_a_candidate_and_names_the_next_command(
    promptplex: Run, server_url: str, base: Path, data: Path, tmp_path: Path
) -> None:
    server = ("--server", server_url)
    train = ("train", str(data), "--task", "moods", "--model", str(base), *TINY, "--push", *server)
    status, shown, err = promptplex(*train, "--out", str(tmp_path / "one"))
    assert status == 0, err
    test = tmp_path / "one" / "test.jsonl"
    gate = f"promptplex compare moods@candidate --against base --data {test} --promote-if better"
    assert f"moods@1 is candidate\nmake it live: {gate}\n" in shown
    history = httpx2.get(f"{server_url}/tasks/moods", trust_env=False).json()
    assert history["aliases"] == {"candidate": 1}
    assert history["versions"][0]["provenance"]["training"]["seed"] == 0
    assert promptplex("alias", "moods", "live", "1", *server)[0] == 0
    status, shown, err = promptplex(*train, "--out", str(tmp_path / "two"), "--seed", "1")
    assert status == 0, err
    test = tmp_path / "two" / "test.jsonl"
    command = f"promptplex compare moods@candidate moods@live --data {test} --promote-if better"
    assert f"moods@2 is candidate\nmake it live: {command}\n" in shown
    status, shown, err = promptplex(*command.split()[1:], *server)
    assert status in (0, 3), err  # 3: it isn't better, so nothing was promoted


def test_another_base_than_the_servers_is_refused_before_training(
    promptplex: Run, server_url: str, data: Path, tmp_path: Path
) -> None:
    other = save_tiny_llama(tmp_path / "deeper", layers=3)
    out = tmp_path / "run"
    arguments = ("--task", "moods", "--model", str(other), *TINY, "--push", "--server", server_url)
    status, _, err = promptplex("train", str(data), *arguments, "--out", str(out))
    assert status == 1
    assert "runs tiny (" in err.splitlines()[-1]
    assert f"{other} is another base (" in err.splitlines()[-1]
    assert not out.exists()


def test_push_without_a_server_is_refused_before_training(run: Run, data: Path, tmp_path: Path) -> None:
    status, _, err = run(str(data), "--push", "--out", str(tmp_path / "run"))
    assert status == 1
    assert "no answer from" in err
    assert not (tmp_path / "run").exists()


def test_the_servers_base_is_named_where_it_is_not_found_here(
    promptplex: Run, server_url: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = promptplex("train", str(data), "--task", "moods", *TINY, "--server", server_url)
    assert status == 1
    assert "runs tiny; name its directory or hub id here with --model" in err


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_end(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    settings = ("--steps", "120", "--eval-every", "40")
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(str(data), "--out", str(whole), *settings)[0] == 0
    given = [str(data), "--task", "moods", "--model", str(base), "--out", str(out), *TINY[:-1], *settings]
    command = [sys.executable, "-m", "app.cli", "train", *given, "--server", "http://127.0.0.1:9"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        lines = [line for line in process.stderr if not _is_first_look(line, process, signal.SIGINT)]
    assert process.wait(PATIENCE) == 130
    assert "the same command with --resume goes on" in lines[-1]
    assert read_run(out).status.state is RunState.CANCELLED
    assert set(os.listdir(out)) & RESULTS == {"run.json"}
    status, _, err = run(str(data), "--out", str(out), *settings, "--resume")
    assert status == 0, err
    for name in ("prompt.safetensors", "test.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def _is_first_look(line: str, process: subprocess.Popen[str], number: int) -> bool:
    """Send the signal as soon as training has begun."""
    if not line.startswith("step 0: dev"):
        return False
    process.send_signal(number)
    return True


def test_signals_interrupt_at_once_unless_a_run_is_in_training() -> None:
    said: list[str] = []
    interruption = Interruption(said.append)
    with interruption.handled():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(KeyboardInterrupt), interruption.deferred():
            signal.raise_signal(signal.SIGTERM)
            assert interruption.is_wanted
            assert len(said) == 1
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_the_last_moment_of_training_is_not_lost() -> None:
    interruption = Interruption(lambda line: None)
    with interruption.handled(), pytest.raises(KeyboardInterrupt), interruption.deferred():
        signal.raise_signal(signal.SIGTERM)


def test_held_out_chats_keep_all_that_a_template_may_look_at(tmp_path: Path) -> None:
    asked = Message("user", "how was it?", {"name": "Ada"})
    example = Example(messages=(asked,), output="great")
    path = tmp_path / "test.jsonl"
    path.write_text(as_held_out(example) + "\n")
    (found,) = read_examples(path)
    assert (found.messages, found.output) == (example.messages, "great")


def test_a_directory_that_another_process_holds_stays_as_it_is(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that begin at once both find no directory; the second must not remove the first one's."""
    out = tmp_path / "run"
    monkeypatch.setattr(train, "check_options", lambda *_: None)
    with held(out):
        (out / ".serving").mkdir()
        status, _, err = run(str(data), "--out", str(out))
        assert status == 1
        assert "another process trains into 'run'" in err
        assert (out / ".serving").is_dir()
