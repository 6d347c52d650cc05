"""The README's requests, as they stand there, against the demo that ships."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from demo.recipes.demos import DEMOS
from demo.recipes.heldout import HELDOUT
from demo.recipes.more import ASK
from demo.recipes.oracle import answers, load_task
from demo.recipes.tasks import TASKS, Task
from tests.api.server import hosted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    """The demo as `make serve` starts it, but for the port and a dtype that is alike everywhere."""
    with hosted(dtype="float32") as url:
        yield url


def _readme_bodies() -> list[dict[str, str]]:
    """But for the request to the task that the README trains, which the tour sends."""
    bodies = re.findall(r"-d '(\{.*?\})'", (ROOT / "README.md").read_text())
    return [body for body in map(json.loads, bodies) if body["task_id"] != "guests"]


def _answer(url: str, body: dict[str, str]) -> str:
    answer = httpx2.post(f"{url}/generate", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generated_text"])


def test_the_readmes_requests(demo_url: str) -> None:
    sentiment, record, steps, choice = (_answer(demo_url, body) for body in _readme_bodies())
    assert sentiment.strip() == "positive"
    assert "The Eagle" in record
    assert "Italian" in record
    assert steps == "27"
    assert choice == "negative"


def test_the_readmes_openai_client(demo_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text()
    snippet = readme[readme.index("    from openai import OpenAI") :].split("\n\nSo does")[0]
    code = textwrap.dedent(snippet).replace("http://localhost:8000", demo_url)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "positive"


def test_the_snippet_of_constrained_output(demo_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "constrained-output.md").read_text()
    snippet = page[page.index("    from openai import OpenAI") :].split("\n\n| where")[0]
    code = textwrap.dedent(snippet).replace("http://localhost:8000", demo_url)
    exec(compile(code, "constrained-output.md", "exec"), {})
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"liked", "stars"}
    assert answer["stars"] in range(1, 6)


def test_the_examples_that_ask_a_server(demo_url: str) -> None:
    def printed(module: str) -> list[str]:
        environment = {**os.environ, "PROMPTPLEX_SERVER": demo_url, "NO_PROXY": "*"}
        command = [sys.executable, "-m", f"examples.{module}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert printed("solve_in_steps") == ["4 + 5 = 9; 3 * 9", "3 * 9 = 27;", "3 * (4 + 5) = 27 (eos_token)"]
    sentiment, aspect = printed("decisions")
    assert sentiment.startswith("Is this review positive or negative? negative (")
    assert aspect.startswith("Which aspect does the review talk about? service (")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_outputs_are_those_of_peft_one_by_one(
    task: Task, demo_url: str, promptplex: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """The first of the held-out inputs; `make demo` compares all of them."""
    data, out = ROOT / HELDOUT / f"{task.name}.jsonl", tmp_path / "report.json"
    flags = ["--task", task.name, "--data", str(data), "--limit", "20", "--out", str(out)]
    status, _, errors = promptplex("eval", *flags, "--server", demo_url)
    assert status == 0, errors
    served = json.loads(out.read_text())["outputs"]
    demo = DEMOS["demo-causal"]
    model, tokenizer = load_task(task, ROOT / demo.path, ROOT / demo.prompts)
    inputs = [line["inputs"] for line in served]
    assert [line["generated"] for line in served] == answers(task, model, tokenizer, inputs)


def test_its_tasks_are_servable(demo_url: str, promptplex: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = promptplex("list", "--server", demo_url, "--json")
    assert status == 0
    servable = {row["id"]: row["servable"] for row in json.loads(out)}
    assert {ASK, *(task.name for task in TASKS)} == set(servable)
    assert all(servable.values())
