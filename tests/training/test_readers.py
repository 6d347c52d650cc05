"""Data files become datasets, and what is wrong with them is said in one line."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidRequest
from app.training.examples import Form
from app.training.readers import read_dataset

DEMO = Path(__file__).parent.parent.parent / "demo" / "heldout"


def written(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pairs(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"inputs": f"question {number}", "output": f"answer {number % 7}"} | more for number in range(count)
    ]


def test_every_line_of_a_file_is_in_one_split(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", pairs(200))
    data = read_dataset(path)
    examples = [*data.train, *data.dev, *data.test]
    assert sorted(each.line for each in examples) == list(range(1, 201))
    assert all(each.inputs == f"question {each.line - 1}" and each.file == "x.jsonl" for each in examples)
    assert (data.form, data.choices, data.warnings) == (Form.INPUTS, (), ())
    assert data.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert min(len(data.dev), len(data.test)) >= 20


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.jsonl")), ids=lambda path: path.stem)
def test_files_of_eval_are_data_too(path: Path) -> None:
    data = read_dataset(path, test_share=0)
    lines = path.read_text().splitlines()
    for example in (*data.train, *data.dev):
        line = json.loads(lines[example.line - 1])
        assert (example.inputs, example.output) == (line["inputs"], line["expected"])
        assert (example.answer, list(example.slots or ()) or None) == (line.get("answer"), line.get("slots"))


FORMS: dict[str, Callable[[int], dict[str, Any]]] = {
    Form.INPUTS: lambda n: {"inputs": {"name": f"{n}"}, "output": "y"},
    Form.PROMPT: lambda n: {"prompt": f"{n}:", "completion": " y"},
    Form.MESSAGES: lambda n: {
        "messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "y"}]
    },
    Form.LABEL: lambda n: {"text": f"{n}", "label": n % 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_known(tmp_path: Path, form: str) -> None:
    data = read_dataset(written(tmp_path / "x.jsonl", map(FORMS[form], range(30))))
    assert data.form == form
    assert data.choices == (("0", "1") if form == Form.LABEL else ())
    answers = {"0", "1"} if form == Form.LABEL else {" y" if form == Form.PROMPT else "y"}
    assert {each.output for each in data.train} == answers


def test_forms_are_not_mixed(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", [FORMS[Form.PROMPT](0), FORMS[Form.LABEL](1)])
    with pytest.raises(
        InvalidRequest, match=r"x\.jsonl, line 2: it has the form text and label, but x\.jsonl, "
    ):
        read_dataset(path)
