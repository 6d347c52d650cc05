"""The answers that training is steered by: those of PEFT, by the engine and the services that serve."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.cli.training.answerer import LocalServer, TaskAnswerer
from app.errors import InvalidRequest, PromptRejected, StoreFull, UnsupportedModel
from app.prompt import Prompt
from app.serving.publishing.task_settings import parse_choices
from app.training.examples import Example
from tests.bases import save_tiny_llama
from tests.oracle import as_prompt, prefix_config, soft_config, tuned

TEXTS = ["the film", "name: Blue Door", "food", "the area was cold and the food great"]
EXAMPLES = [Example(inputs=text, output="?") for text in TEXTS]
TASK = {"template": "say: {text}\n", "defaults": {"max_new_tokens": 6}}


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    store = tmp_path_factory.mktemp("scratch") / "store"
    with LocalServer(str(base), store, dtype="float32", progress=lambda line: None) as server:
        yield server


def trained(base: Path, directory: Path, kind: str, seed: int = 1) -> tuple[PeftModel, Prompt]:
    config = {"soft": soft_config(5), "prefix": prefix_config(5)}[kind]
    model = tuned(AutoModelForCausalLM.from_pretrained(base), config, seed=seed)
    return model, as_prompt(model, directory)


def said(base: Path, model: object, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)  # type: ignore[attr-defined]
    return str(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_answers_are_those_of_peft(server: LocalServer, base: Path, tmp_path: Path, kind: str) -> None:
    model, prompt = trained(base, tmp_path, kind)
    expected = [said(base, model, f"say: {text}\n") for text in TEXTS]
    assert TaskAnswerer(server, TASK).answers(prompt, EXAMPLES) == expected
    assert len(set(expected)) > 1


def test_a_full_disk_is_said_in_words_of_the_run(server: LocalServer, base: Path, tmp_path: Path) -> None:
    _, prompt = trained(base, tmp_path, "soft", seed=9)
    soft, bound = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, bound))  # bytes of a file
    try:
        with pytest.raises(StoreFull, match="choose another --out"):
            server.publish(TASK, prompt)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, bound))
        signal.signal(signal.SIGXFSZ, ignored)


def test_each_prompt_of_a_run_answers_for_itself(server: LocalServer, base: Path, tmp_path: Path) -> None:
    answerer = TaskAnswerer(server, TASK)
    prompts = [trained(base, tmp_path, "soft", seed)[1] for seed in (1, 2)]
    one, other = (answerer.answers(prompt, EXAMPLES) for prompt in prompts)
    assert one != other
    assert answerer.answers(prompts[0], EXAMPLES) == one


@pytest.mark.parametrize("template", ["say: {text}\n", None])
def test_without_a_prompt_the_base_answers(server: LocalServer, base: Path, template: str | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    task = {"template": template, "defaults": {"max_new_tokens": 6}}
    asked = [text if template is None else f"say: {text}\n" for text in TEXTS]
    expected = [said(base, model, text) for text in asked]
    assert TaskAnswerer(server, task).answers(None, EXAMPLES) == expected


def test_a_default_beyond_the_bases_positions_is_cut_as_it_is_when_served(
    server: LocalServer, base: Path, tmp_path: Path
) -> None:
    task = {"defaults": {"max_new_tokens": server.geometry.max_positions}}
    assert len(TaskAnswerer(server, task).answers(None, EXAMPLES[:1])) == 1
    assert len(TaskAnswerer(server, task).answers(trained(base, tmp_path, "soft")[1], EXAMPLES[:1])) == 1


def test_it_serves_as_the_server_does(base: Path, tmp_path: Path) -> None:
    with LocalServer(str(base), tmp_path / "store", max_context=64, progress=lambda line: None) as server:
        assert server.geometry.max_positions == 64


def test_fields_and_choices(server: LocalServer, base: Path, tmp_path: Path) -> None:
    prompt = trained(base, tmp_path, "prefix")[1]
    task = {**TASK, "template": "{name}: {food}", "choices": ["great", "cold"]}
    answerer = TaskAnswerer(server, task)
    example = Example(inputs={"name": "Door", "food": "Thai"}, output="great")
    assert answerer.answers(prompt, [example]) == answerer.answers(prompt, [example])
    (found,) = answerer.probabilities(prompt, [example], parse_choices(["great", "cold"]))
    assert set(found) == {"great", "cold"}
    assert sum(found.values()) == pytest.approx(1)


def test_more_examples_than_the_engine_takes_at_once(server: LocalServer, base: Path, tmp_path: Path) -> None:
    prompt = trained(base, tmp_path, "soft")[1]
    answerer = TaskAnswerer(server, {**TASK, "defaults": {"max_new_tokens": 1}})
    assert answerer.answers(prompt, EXAMPLES * 300) == answerer.answers(prompt, EXAMPLES) * 300


def test_what_cannot_be_served_is_refused(server: LocalServer, base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="template"):
        TaskAnswerer(server, {"template": "no field"}).answers(None, EXAMPLES)
    with pytest.raises(InvalidRequest, match="fields"):
        TaskAnswerer(server, TASK).answers(None, [Example(inputs={"other": "x"}, output="")])
    assert TaskAnswerer(server, TASK).answers(None, []) == []


def test_a_prompt_of_another_base_is_refused(server: LocalServer, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "deeper", layers=3)
    prompt = trained(other, tmp_path / "prompt", "prefix")[1]
    with pytest.raises(PromptRejected):
        TaskAnswerer(server, TASK).answers(prompt, EXAMPLES)


def test_a_base_that_is_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel):
        LocalServer(str(tmp_path / "none"), tmp_path / "store", progress=lambda line: None)
    assert os.listdir(tmp_path) in ([], ["store"])
