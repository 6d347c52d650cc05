"""push, list, show, rollback, validate: against a running server, and on a store's files."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from tests.bases import save_tiny_llama

Run = Callable[..., tuple[int, str, str]]


def _generate(url: str, **body: object) -> dict[str, object]:
    answer = httpx2.post(f"{url}/generate", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    result: dict[str, object] = answer.json()
    return result


def test_a_just_saved_peft_directory_serves_the_next_request(
    promptplex: Run, save_peft: Callable[..., Path], server_url: str, tmp_path: Path
) -> None:
    directory = save_peft(tmp_path / "film-mood", tokens=7)
    status, out, err = promptplex("push", str(directory), "--server", server_url)
    assert (status, err) == (0, "")
    assert out == "film-mood@1 (soft, 7 virtual tokens): live since release 1\n"
    answer = _generate(server_url, task_id="film-mood", inputs="the film", parameters={"max_new_tokens": 4})
    assert answer["task_version"] == 1

    status, out, _ = promptplex("list", "--server", server_url)
    assert status == 0
    assert [line.split() for line in out.splitlines() if "film-mood" in line] == [
        ["film-mood", "1", "soft", "7", "yes"]
    ]


def test_show_says_how_a_version_was_trained(promptplex: Run, tmp_path: Path) -> None:
    training = {"method": "prefix", "best_step": 250, "seed": 3, "data_sha256": "ab" * 32}
    task = {"template": "{x}", "metrics": {"exact": 0.925}, "training": training}
    directory = tmp_path / "trained"
    directory.mkdir()
    (directory / "task.json").write_text(json.dumps(task))
    store = ("--store", str(tmp_path / "store"))
    assert promptplex("push", str(directory), *store)[0] == 0
    _, out, _ = promptplex("show", "trained", *store)
    assert "         trained: prefix, step 250, seed 3, data sha256:abababababab\n" in out
    assert "         measured: exact 0.925\n" in out


def test_show_is_not_steered_by_what_an_uploader_wrote(promptplex: Run, tmp_path: Path) -> None:
    training = {"method": "\x1b[2Jprefix\nalias    live -> 9", "best_step": 1}
    task = {"template": "{x}", "metrics": {"exact\n\u202e": 1}, "training": training}
    directory = tmp_path / "sly"
    directory.mkdir()
    (directory / "task.json").write_text(json.dumps(task))
    store = ("--store", str(tmp_path / "store"))
    assert promptplex("push", str(directory), *store)[0] == 0
    _, out, _ = promptplex("show", "sly", *store)
    assert "\\x1b[2Jprefix\\nalias    live -> 9, step 1\n" in out
    assert "exact\\n\\u202e 1\n" in out
    assert "\x1b" not in out


def test_versions_and_rollback_over_http(
    promptplex: Run, save_peft: Callable[..., Path], server_url: str, tmp_path: Path
) -> None:
    server = ("--server", server_url)
    for seed, kind in enumerate(("soft", "prefix")):
        directory = save_peft(tmp_path / kind, kind=kind, seed=seed)
        status, out, _ = promptplex("push", str(directory), "--task", "twice", "--json", *server)
        assert (status, json.loads(out)["version"]) == (0, seed + 1)
    _, out, _ = promptplex("show", "twice", *server)
    assert "alias    live -> 2" in out
    assert "version  2: prefix, 5 virtual" in out
    status, out, _ = promptplex("rollback", "twice", *server)
    assert (status, out) == (0, "twice@live is version 1 since release 3\n")
    _, out, _ = promptplex("show", "twice", "--json", *server)
    assert json.loads(out)["aliases"] == {"live": 1}
    _, out, _ = promptplex("push", str(tmp_path / "prefix"), "--task", "twice", *server)
    assert out == "twice@2 (prefix, 5 virtual tokens): not new, so no alias moved\n"
    status, _, err = promptplex("rollback", "twice", *server)
    assert status == 1
    assert err.startswith("error: ")


def test_a_text_only_task_without_a_directory(promptplex: Run, server_url: str) -> None:
    template = "name: {name} | food: {food}"
    status, out, _ = promptplex("push", "--task", "menu", "--template", template, "--server", server_url)
    assert (status, out) == (0, "menu@1 (text): live since release 1\n")
    inputs = {"name": "Blue Door", "food": "Thai"}
    assert _generate(server_url, task_id="menu", inputs=inputs, parameters={"max_new_tokens": 2})


def test_examples_that_differ_are_pointed_out(
    promptplex: Run, save_peft: Callable[..., Path], server_url: str, tmp_path: Path
) -> None:
    directory = save_peft(tmp_path / "wrong-examples")
    (directory / "task.json").write_text(
        json.dumps({"examples": [{"inputs": "the film", "expected": "surely not this"}]})
    )
    status, out, err = promptplex("push", str(directory), "--server", server_url)
    assert status == 0
    assert "live since release 1" in out
    assert "warning: 1 of 1 examples differ: 'the film' gave" in err
    assert "promptplex retire wrong-examples" in err  # there is nothing before it to go back to


def test_another_alias_or_none(promptplex: Run, server_url: str) -> None:
    push = ("push", "--task", "aliased", "--server", server_url)
    assert promptplex(*push, "--template", "a {x}", "--alias", "none")[1].endswith(": no alias moved\n")
    assert promptplex(*push, "--template", "b {x}", "--alias", "beta")[1].endswith("beta since release 1\n")


def test_the_servers_reason_is_shown(
    promptplex: Run, save_peft: Callable[..., Path], server_url: str, tmp_path: Path
) -> None:
    other = save_tiny_llama(tmp_path / "three", layers=3)
    directory = _save_for(other, tmp_path / "wrong")
    status, out, err = promptplex("push", str(directory), "--server", server_url)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "layers" in err
    assert "Traceback" not in err
    status, _, err = promptplex("show", "wrong", "--server", server_url)
    assert (status, "wrong" in err) == (1, True)
    status, _, err = promptplex("push", str(directory), "--task", "../up", "--server", server_url)
    assert (status, err.startswith("error: ")) == (1, True)


def _save_for(base: Path, directory: Path) -> Path:
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    get_peft_model(model, config).save_pretrained(directory)
    return directory


def test_no_server_says_what_to_do(promptplex: Run, unused_port: int) -> None:
    status, _, err = promptplex("list", "--server", f"http://127.0.0.1:{unused_port}")
    assert status == 1
    assert "start a server with `promptplex serve`" in err


def test_something_else_on_the_port(promptplex: Run, server_url: str) -> None:
    status, _, err = promptplex("list", "--server", f"{server_url}/elsewhere")
    assert status == 1
    assert err.startswith("error: ")


def test_the_same_on_a_stores_files(promptplex: Run, save_peft: Callable[..., Path], tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "store"))
    status, _, err = promptplex("list", *store)
    assert (status, "no store" in err) == (1, True)
    first, second = (save_peft(tmp_path / f"p{seed}", seed=seed) for seed in (0, 1))
    assert promptplex("push", str(first), "--task", "mood", *store)[1] == (
        "mood@1 (soft, 5 virtual tokens): live since release 1\n"
    )
    assert promptplex("push", str(first), "--task", "mood", *store)[1].startswith("mood@1 ")
    assert promptplex("push", str(second), "--task", "mood", *store)[1].startswith("mood@2 ")
    assert promptplex("rollback", "mood", *store)[1] == "mood@live is version 1 since release 3\n"
    _, out, _ = promptplex("list", "--json", *store)
    assert [(row["id"], row["version"], row["kind"]) for row in json.loads(out)] == [("mood", 1, "soft")]
    _, out, _ = promptplex("show", "mood", "--json", *store)
    shown = json.loads(out)
    assert [release["aliases"]["live"] for release in shown["releases"]] == [1, 2, 1]


def test_a_store_answers_in_the_rows_of_a_server(promptplex: Run, server_url: str, tmp_path: Path) -> None:
    shown = []
    for target in (("--server", server_url), ("--store", str(tmp_path / "store"))):
        promptplex("push", "--task", "rows", "--template", "rows {x}", *target)
        listed = json.loads(promptplex("list", "--json", *target)[1])
        row = next(row for row in listed if row["id"] == "rows")
        shown.append((row, json.loads(promptplex("show", "rows", "--json", *target)[1])))
    (row, task), (stored_row, stored) = shown
    unknown = {"servable", "not_servable_because", "resident", "requests_served"}  # without a base
    assert row.keys() - unknown == stored_row.keys()
    assert task.keys() - unknown == stored.keys()
    assert task["versions"][0].keys() - unknown == stored["versions"][0].keys()
    assert task["releases"][0].keys() == stored["releases"][0].keys()
    assert (task["releases"][0]["why"], stored["releases"][0]["why"]) == ("upload", "upload")


def test_a_store_checks_the_alias_before_anything_is_stored(promptplex: Run, tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "store"))
    status, _, err = promptplex("push", "--task", "a", "--template", "a {x}", "--alias", "7", *store)
    assert (status, "An alias is" in err) == (1, True)
    assert not (tmp_path / "store").exists()


def test_validate_alone_and_against_a_base(
    promptplex: Run, save_peft: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    directory = save_peft(tmp_path / "good", kind="prefix")
    status, out, _ = promptplex("validate", str(directory))
    assert status == 0
    assert out.startswith("prefix of 5 virtual tokens, sha256:")
    status, out, _ = promptplex("validate", str(directory), "--model", str(base))
    assert (status, out.splitlines()[-1]) == (0, "fits tiny")
    wrong = _save_for(save_tiny_llama(tmp_path / "three", layers=3), tmp_path / "wrong")
    status, _, err = promptplex("validate", str(wrong), "--model", str(base))
    assert status == 1
    assert "expected: " in err
    assert "found: " in err


def test_embeddings_beside_the_prompt(promptplex: Run, base: Path, server_url: str, tmp_path: Path) -> None:
    """As PEFT saves them where the vocabulary was resized, with no flag at all."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 1)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    directory = tmp_path / "padded"
    with pytest.warns(UserWarning, match="has been resized"):
        get_peft_model(model, config).save_pretrained(directory)
    status, out, err = promptplex("push", str(directory), "--server", server_url)
    assert (status, out) == (0, "padded@1 (soft, 3 virtual tokens): live since release 1\n")
    assert "lm_head.weight' has 1 rows more than the base model" in err
    status, out, err = promptplex("validate", str(directory), "--model", str(base))
    assert (status, out.splitlines()[-1], "1 rows more" in err) == (0, "fits tiny", True)
    assert "embed_tokens.weight" in promptplex("validate", str(directory))[1]
    status, _, err = promptplex("push", str(directory), "--store", str(tmp_path / "store"))
    assert (status, "save_embedding_layers=False" in err) == (1, True)


@pytest.mark.parametrize("damage", ["truncated", "trailing"])
def test_validate_refuses_damaged_files(
    promptplex: Run, save_peft: Callable[..., Path], tmp_path: Path, damage: str
) -> None:
    directory = save_peft(tmp_path / "bad")
    weights = directory / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] if damage == "truncated" else data + b"more")
    status, _, err = promptplex("validate", str(directory))
    assert status == 1
    assert err.startswith("error: ")


def test_a_path_that_does_not_exist(promptplex: Run, tmp_path: Path) -> None:
    status, _, err = promptplex("validate", str(tmp_path / "nowhere"))
    assert (status, "no such file" in err) == (1, True)


def test_push_needs_something_to_push(promptplex: Run) -> None:
    status, _, err = promptplex("push")
    assert (status, "--template" in err) == (1, True)


def test_an_ensemble_and_spread_paraphrases(promptplex: Run, server_url: str, tmp_path: Path) -> None:
    """The same words on a server and on a store's files."""
    directory = tmp_path / "both"
    directory.mkdir()
    program = {"vote": {"n": 3}, "paraphrases": ["{x}: ?", "what of {x}?"]}
    for where in (("--server", server_url), ("--store", str(tmp_path / "store"))):
        for number in (1, 2):
            task = {"template": f"{number} {{x}}", **(program if number == 2 else {})}
            (directory / "task.json").write_text(json.dumps(task))
            assert promptplex("push", str(directory), *where)[0] == 0
        _, out, _ = promptplex("alias", "both", "live", "1", "2", "--ensemble", *where)
        assert out == "both@live is version 1 (1), 2 (1) together since release 3\n"
        _, out, _ = promptplex("alias", "both", "all", "1=1", "2=3", "--ensemble", *where)
        assert out == "both@all is version 1 (1), 2 (3) together since release 4\n"
        _, out, _ = promptplex("alias", "both", "live", "2", "--spread-paraphrases", *where)
        assert out == "both@live is version 2 (each user one of its paraphrases) since release 5\n"
        _, out, _ = promptplex("rollback", "both", *where)
        assert out == "both@live is version 1 (1), 2 (1) together since release 6\n"
        _, out, _ = promptplex("show", "both", *where)
        assert "alias    all -> 1 (1), 2 (3) together\n" in out
        assert '         vote: {"n": 3' in out
        if "--server" in where:
            data = tmp_path / "data.jsonl"
            data.write_text('{"inputs": "a", "output": "b"}\n')
            promptplex("alias", "both", "one", "2", "--spread-paraphrases", *where)
            status, _, err = promptplex("eval", "--data", str(data), "--task", "both@one", *where)
            says = "is one of several paraphrases; evaluate one version: both@2"
            assert (status, says in err) == (1, True), err
            assert promptplex("eval", "--data", str(data), "--task", "both", *where)[0] == 0, "an ensemble"
        assert "         paraphrases: 2\n" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("1", "2", "--spread-paraphrases"), "name one"),
        (("1", "--ensemble"), "between 2 and 16"),
        (("1", "2", "--ensemble", "--spread-paraphrases"), "give one of them"),
        (("1", "2"), "several versions need weights"),
    ],
)
def test_targets_that_make_no_sense(
    promptplex: Run, tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    store = ("--store", str(tmp_path / "store"))
    for template in ("1 {x}", "2 {x}"):
        assert promptplex("push", "--task", "odd", "--template", template, *store)[0] == 0
    status, _, err = promptplex("alias", "odd", "live", *args, *store)
    assert (status, says in err) == (1, True)


def test_flags_say_what_a_task_does_beyond_a_completion(promptplex: Run, tmp_path: Path) -> None:
    directory, store = tmp_path / "flagged", ("--store", str(tmp_path / "store"))
    directory.mkdir()
    task = {"template": "{x}", "reasoning": {"answer_after": "so:", "steps_end": "\n"}, "vote": {"n": 3}}
    (directory / "task.json").write_text(json.dumps(task))
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"inputs": "a", "output": "b"}\n{"inputs": {"x": "c"}, "output": "d"}\n')
    flags = ("--reasoning-marker", "answer:", "--effort", "low=8,high=64", "--vote", "9")
    more = ("--calibration-temperature", "1.7", "--paraphrase", "{x}?", "--paraphrase", "{x}!")
    pushed = promptplex("push", str(directory), *flags, *more, "--few-shot", str(shots), *store)
    assert pushed[0] == 0, pushed[2]
    [version] = json.loads(promptplex("show", "flagged", "--json", *store)[1])["versions"]
    assert version["reasoning"] == {
        "answer_after": "answer:",
        "steps_end": "\n",
        "effort": {"low": 8, "high": 64},
    }
    assert version["vote"] == {"n": 9}
    assert version["calibration"] == {"temperature": 1.7}
    assert version["paraphrases"] == ["{x}?", "{x}!"]
    assert version["few_shot"] == [{"inputs": "a", "output": "b"}, {"inputs": {"x": "c"}, "output": "d"}]
    chain = ("--chain-template", "{x}\n{so_far}", "--step-ends", "\n", "--done", "answer:")
    rest = ("--max-steps", "5", "--max-step-tokens", "7", "--chain-step", "a", "--chain-step", "b@2")
    assert promptplex("push", "--task", "chained", *chain, *rest, *store)[0] == 0
    [version] = json.loads(promptplex("show", "chained", "--json", *store)[1])["versions"]
    assert version["chain"] == {
        "template": "{x}\n{so_far}",
        "step_ends": "\n",
        "done": "answer:",
        "max_steps": 5,
        "max_step_tokens": 7,
        "steps": [{"task": "a"}, {"task": "b@2"}],
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--effort", "low"), "such as low=32"),
        (("--effort", "much=3"), "task.reasoning"),
        (("--steps-end", ";"), "must have the field answer_after"),
        (("--vote", "1"), "task.vote.n"),
        (("--done", "x"), "must have the field template"),
        (("--paraphrase", "{y}"), "task.paraphrases[0]"),
        (("--reasoning-marker", "x", "--chain-template", "{last}"), "both say where the answer is"),
    ],
)
def test_flags_that_make_no_sense(promptplex: Run, tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    store = ("--store", str(tmp_path / "store"))
    status, _, err = promptplex("push", "--task", "odd", "--template", "{x}", *flags, *store)
    assert (status, says in err) == (1, True), err
