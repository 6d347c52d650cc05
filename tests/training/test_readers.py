"""Data files become datasets, and what is wrong with them is said in one line."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from app.api.schemas.messages import ChatMessage
from app.errors import InvalidRequest
from app.training.examples import Form
from app.training.readers import named_paths, read_dataset, read_tasks

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


CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "developer", "content": "Be brief."}, {"role": "user", "name": "Ann", "content": "Hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": ""},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
def test_messages_are_those_of_the_chat_route(tmp_path: Path, chat: list[dict[str, Any]]) -> None:
    answer = {"role": "assistant", "content": "Hello."}
    rows = [{"messages": [*chat[:-1], chat[-1] | {"name": f"n{number}"}, answer]} for number in range(20)]
    for example in read_dataset(written(tmp_path / "x.jsonl", rows)).train:
        messages = rows[example.line - 1]["messages"][:-1]
        assert example.messages == tuple(ChatMessage.model_validate(each).message() for each in messages)
        assert example.output == "Hello."


def test_a_table_with_quotes_line_breaks_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = "".join(f'"a ""{n}"", b\n c",yes\r\n\r\n' if n % 2 else f"plain {n},no\n" for n in range(40))
    path.write_bytes(b"\xef\xbb\xbftext,label\r\n" + rows.encode())
    data = read_dataset(path)
    found = {each.inputs: each for each in (*data.train, *data.dev, *data.test)}
    assert data.choices == ("no", "yes")
    assert found["plain 0"].line == 2
    assert found['a "1", b\n c'].line == 3
    assert found["plain 2"].line == 6
    assert found["plain 38"].output == "no"


def test_columns_beside_the_answer_are_fields_of_the_template(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("name\tfood\toutput\n" + "".join(f"Door {n}\tThai\tyes {n}\n" for n in range(20)))
    example = read_dataset(path).train[0]
    assert example.inputs == {"name": f"Door {example.line - 2}", "food": "Thai"}
    assert example.output == f"yes {example.line - 2}"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"])
def test_marks_line_ends_and_rare_line_separators_are_no_matter(
    tmp_path: Path, mark: bytes, end: bytes
) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(row | {"output": "a\u2028b\x85c"}, ensure_ascii=False).encode() for row in pairs(20)]
    path.write_bytes(mark + end.join(lines))
    data = read_dataset(path)
    assert len([*data.train, *data.dev, *data.test]) == 20
    assert {each.output for each in data.train} == {"a\u2028b\x85c"}


def directory_of(path: Path, **files: Iterable[Any]) -> Path:
    path.mkdir(exist_ok=True)
    for name, rows in files.items():
        written(path / f"{name}.jsonl", rows)
    return path


@pytest.mark.parametrize("dev", ["dev", "validation", "valid", "val"])
def test_files_of_a_directory_are_its_splits(tmp_path: Path, dev: str) -> None:
    rows = pairs(60)
    path = directory_of(tmp_path / "d", **{"train": rows[:40], dev: rows[40:50], "test": rows[50:]})
    (path / "README.md").write_text("not data")
    data = read_dataset(path)
    assert [len(data.train), len(data.dev), len(data.test)] == [40, 10, 10]
    assert [each.inputs for each in data.test] == [row["inputs"] for row in rows[50:]]
    assert data.test[0].place == "test.jsonl, line 1"
    listed = read_dataset([path / "test.jsonl", path / f"{dev}.jsonl", path / "train.jsonl"])
    assert listed == data
    assert len(data.digest) == 64


def test_a_split_without_a_file_comes_from_train(tmp_path: Path) -> None:
    rows = pairs(120)
    data = read_dataset(directory_of(tmp_path / "d", train=rows[:100], test=rows[100:]))
    assert len(data.test) == 20
    assert len(data.dev) >= 8
    assert len(data.train) == 100 - len(data.dev)


def test_what_is_held_out_too_is_left_out_of_train(tmp_path: Path) -> None:
    rows = pairs(60)
    again = [{"inputs": f"  QUESTION\n {number}", "output": "?"} for number in (50, 51, 40)]
    path = directory_of(tmp_path / "d", train=rows[:40] + again, dev=[*rows[40:50], rows[50]], test=rows[50:])
    data = read_dataset(path)
    assert [len(data.train), len(data.dev), len(data.test)] == [40, 10, 10]
    assert data.warnings[:2] == (
        "lines left out of train, since their inputs are held out too: 3, such as train.jsonl, line 41 "
        "(test.jsonl, line 1)",
        "lines left out of dev, since their inputs are held out too: 1, such as dev.jsonl, line 11 "
        "(test.jsonl, line 1)",
    )


def test_a_test_file_that_is_train_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    path = directory_of(tmp_path / "d", train=pairs(40), test=pairs(40))
    with pytest.raises(
        InvalidRequest, match=r"train\.jsonl: it holds 0 different inputs .*left out of train, .*: 40"
    ):
        read_dataset(path)
    path = directory_of(tmp_path / "d", train=pairs(80)[40:], dev=pairs(40), test=pairs(40))
    with pytest.raises(InvalidRequest, match=r"dev\.jsonl: all its inputs are held out in test too"):
        read_dataset(path)


def test_files_with_other_names_are_not_guessed(tmp_path: Path) -> None:
    path = directory_of(tmp_path / "d", train=pairs(20), more=pairs(20))
    with pytest.raises(InvalidRequest, match=r"^d: more\.jsonl is called neither train, dev"):
        read_dataset(path)
    path = directory_of(tmp_path / "e", dev=pairs(20))
    with pytest.raises(InvalidRequest, match=r"^e: nothing in it is called train"):
        read_dataset(path)
    path = directory_of(tmp_path / "f", train=pairs(20), dev=pairs(20), valid=pairs(20))
    with pytest.raises(InvalidRequest, match=r"^f: dev\.jsonl and valid\.jsonl are both dev; leave one out"):
        read_dataset(path)
    path = directory_of(tmp_path / "g", train=pairs(20), test=map(FORMS[Form.PROMPT], range(20)))
    with pytest.raises(
        InvalidRequest, match=r"^test\.jsonl, line 1: it has the form prompt and completion, but"
    ):
        read_dataset(path)


def test_contradictions_and_repetitions_are_said(tmp_path: Path) -> None:
    rows = [*pairs(40), {"inputs": "Question 3", "output": "other"}, pairs(40)[5]]
    data = read_dataset(written(tmp_path / "x.jsonl", rows), dev_share=0, test_share=0)
    assert data.warnings == (
        "inputs with several answers: 1, such as 'answer 3' (x.jsonl, line 4) and 'other' (x.jsonl, line 41)",
        "lines of train that repeat another one: 1, such as x.jsonl, line 42 (x.jsonl, line 6)",
    )


def test_labels_that_look_alike_and_answers_that_never_change_are_said(tmp_path: Path) -> None:
    labels = [{"text": f"{n}", "label": ("Yes", "no", "yes")[n % 3]} for n in range(90)]
    data = read_dataset(written(tmp_path / "x.jsonl", labels))
    assert data.choices == ("Yes", "no", "yes")
    assert (
        "the labels 'Yes' and 'yes' differ in case or white space only, and count as different"
        in data.warnings
    )
    same = read_dataset(written(tmp_path / "x.jsonl", [row | {"output": "a"} for row in pairs(200)]))
    assert same.warnings == ("every answer of train is 'a', so inputs make no difference",)


def test_a_label_that_is_never_trained_is_refused(tmp_path: Path) -> None:
    rows = [{"text": f"{n}", "label": "ab"[n % 2]} for n in range(40)]
    path = directory_of(tmp_path / "d", train=rows, test=[{"text": "z", "label": "c"}])
    with pytest.raises(InvalidRequest, match=r"test\.jsonl, line 1: label 'c' is on no line of train"):
        read_dataset(path)


def test_whole_numbers_are_labels_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"{n}", "label": n % 12} for n in range(240)]
    assert read_dataset(written(tmp_path / "x.jsonl", rows)).choices == tuple(map(str, range(12)))


def test_choices_of_lines_are_the_tasks(tmp_path: Path) -> None:
    rows = [row | {"output": "yes", "choices": ["no", "yes"]} for row in pairs(20)]
    assert read_dataset(written(tmp_path / "x.jsonl", rows)).choices == ("no", "yes")


def test_several_tasks_have_names(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", pairs(20))
    odd = written(tmp_path / "a=b.jsonl", pairs(20))
    assert named_paths([str(path)]) is named_paths([str(odd), str(path)]) is None
    assert named_paths([f"one={path}", f"two={odd}"]) == {"one": path, "two": odd}
    assert read_tasks({"one": path, "two": odd})["two"].train[0].file == "a=b.jsonl"
    with pytest.raises(
        InvalidRequest, match=r"it has no name, but others have; write NAME=PATH for each task"
    ):
        named_paths([f"one={path}", str(path)])
    with pytest.raises(InvalidRequest, match=r"^one: two tasks have this name"):
        named_paths([f"one={path}", f"one={odd}"])
    with pytest.raises(InvalidRequest, match=r"^two: missing\.jsonl: there is no such file"):
        read_tasks({"one": path, "two": tmp_path / "missing.jsonl"})


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_shares_have_bounds(tmp_path: Path, share: float) -> None:
    with pytest.raises(InvalidRequest, match=r"the share of dev must be from 0 to 0\.5"):
        read_dataset(written(tmp_path / "x.jsonl", pairs(20)), dev_share=share)


def test_a_saved_dataset_wants_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.training.saved_datasets.find_spec", lambda name: None)
    path = tmp_path / "saved"
    path.mkdir()
    (path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(
        InvalidRequest, match=r"^saved: it was saved by the package datasets, which isn't inst"
    ):
        read_dataset(path)


def test_a_saved_dataset_is_read_by_its_package(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    classes = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}

    def dataset(numbers: Iterable[int], **more: Any) -> Any:
        rows = {"text": [f"text {n}" for n in numbers], "label": [n % 2 for n in numbers]}
        features = datasets.Features(classes | {name: datasets.Value("int64") for name in more})
        table = datasets.table.InMemoryTable.from_pydict(rows | more, features.arrow_schema)
        return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint="tiny")

    parts = {"train": dataset(range(60)), "test": dataset(range(60, 80))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    data = read_dataset(tmp_path / "dict")
    assert [each.inputs for each in data.test] == [f"text {n}" for n in range(60, 80)]
    assert (data.choices, data.test[1].output, data.test[1].place) == (
        ("bad", "good"),
        "good",
        "test, line 2",
    )
    dataset(range(80)).save_to_disk(tmp_path / "one")
    assert len(read_dataset(tmp_path / "one").digest) == 64
    dataset(range(80), idx=[7] * 80).save_to_disk(tmp_path / "odd")
    with pytest.raises(
        InvalidRequest, match=r"^train, line 1: unknown field 'idx'; a line has text and label"
    ):
        read_dataset(tmp_path / "odd")
    (tmp_path / "odd" / "state.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"^odd: the package datasets can't read it: "):
        read_dataset(tmp_path / "odd")
