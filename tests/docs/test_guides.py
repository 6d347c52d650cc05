"""The guides' commands, as they stand there, one after the other, against the demo that ships.

A fenced block of `sh` or `python` is run; the `text` or `json` block right after it is what it must print,
where `...` stands for anything.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.main import get_group

from app.cli import cli
from app.serving.publishing.bundle import read_bundle
from app.serving.publishing.task_settings import parse_task
from app.store.importers import import_prompt
from app.text.template import parse_template
from tests.cli.conftest import Server

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
RUN_SECONDS = 600


class Step(NamedTuple):
    language: str
    code: str
    expected: str | None


def steps(page: Path) -> list[Step]:
    guide, blocks = page.name, BLOCK.findall(page.read_text())
    found: list[Step] = []
    for language, text in blocks:
        if language in ("sh", "python"):
            found.append(Step(language, text, None))
        else:
            assert found, f"{guide}: nothing was run before this output: {text}"
            assert found[-1].expected is None, f"{guide}: two outputs of one block"
            found[-1] = found[-1]._replace(expected=text)
    return found


def matches(expected: str, printed: str) -> bool:
    pattern = ".*?".join(map(re.escape, expected.strip().split("...")))
    return re.fullmatch(pattern, printed.strip(), re.S) is not None


@pytest.fixture
def demo_url(demo: str | None, tmp_path: Path) -> Iterator[str]:
    """A demo on a store of its own, and in a dtype that is alike everywhere."""
    flags = [*flags_of(demo), "--dtype", "float32", "--store", str(tmp_path / "store")]
    if demo is None:
        shutil.copytree(ROOT / "prompts_store", tmp_path / "store")
    with Server.running(*flags) as server:
        url = server.wait_until_ready()
        for task in os.listdir(ROOT / f"demo/{demo}-prompts") if demo else ():
            server.wait_for(f"{task} imported as ")
        yield url


def flags_of(demo: str | None) -> list[str]:
    """What `make serve DEMO=...` gives the server."""
    if demo is None:
        return []
    printed = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "serve", f"DEMO={demo}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return shlex.split(printed.splitlines()[-1])[3:]  # exec promptplex serve


@pytest.mark.parametrize(
    ("guide", "demo"),
    [("tour.md", None), ("clients.md", None), ("programs.md", None), ("encoder-decoders.md", "seq2seq")],
)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the guides' commands need curl")
@pytest.mark.skipif(shutil.which("bash") is None, reason="the guides' commands need bash")
def test_what_a_guide_says_is_what_happens(guide: str, demo_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    for shipped in ("demo", "examples"):
        (folder / shipped).symlink_to(ROOT / shipped)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "promptplex").symlink_to(Path(sys.executable).with_name("promptplex"))
    environment = {**os.environ, "PROMPTPLEX_SERVER": demo_url, "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
    environment.pop("HF_HUB_OFFLINE", None)  # its client then refuses every address, this machine's too
    ran = steps(ROOT / "docs" / guide)
    assert sum(step.expected is not None for step in ran) >= 5
    for step in ran:
        code = step.code.replace("http://localhost:8000", demo_url).replace(
            "localhost:8000", demo_url.removeprefix("http://")
        )
        command = ["bash", "-euo", "pipefail"] if step.language == "sh" else [sys.executable, "-"]
        done = subprocess.run(
            command,
            input=code,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        if step.expected is not None:
            assert matches(step.expected, done.stdout), f"{code}\nprinted\n{done.stdout}\n{done.stderr}"


def test_the_readme_s_commands_are_the_tour_s() -> None:
    shown = [step.code for step in steps(ROOT / "README.md")]
    assert len(shown) == 3
    assert [step.code for step in steps(ROOT / "docs" / "tour.md") if step.code in shown] == shown


def test_the_script_of_the_peft_guide_makes_what_push_takes(tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (script,) = (step.code for step in steps(ROOT / "docs" / "peft.md") if step.language == "python")
    assert "range(75)" in script
    script = script.replace("range(75)", "range(3)")  # as many make a prompt of the same form
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=RUN_SECONDS, check=True)
    prompt = import_prompt(read_bundle(tmp_path / "swap").files).prompt
    assert prompt.num_virtual_tokens == 16


def test_the_task_file_of_the_peft_guide_is_taken() -> None:
    guide = (ROOT / "docs" / "peft.md").read_text()
    (written,) = (text for language, text in BLOCK.findall(guide) if language == "json")
    task = parse_task(json.loads(written))
    assert task.template is not None
    assert parse_template(task.template).fields == ("text",)
    assert task.choices == ("positive", "negative")


@pytest.mark.parametrize("guide", ["training.md", "peft.md"])
def test_the_commands_of_a_guide_exist_with_their_flags(guide: str) -> None:
    text = (ROOT / "docs" / guide).read_text().replace("\\\n", " ")  # a command may go on in the next line
    lines = re.findall(r"^(?:    )?promptplex (.+?)(?:  +#.*)?$", text, re.M)
    assert len(lines) >= 4
    commands = get_group(cli).commands
    for name, *arguments in map(shlex.split, lines):
        commands[name].make_context(name, arguments)
