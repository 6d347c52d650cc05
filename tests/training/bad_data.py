"""Files that can't be trained on, each with what must be said of it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

GOOD = [json.dumps({"inputs": f"question {n}", "output": f"answer {n}"}) for n in range(30)]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def _lines(*lines: str | bytes, after: int = 0) -> bytes:
    """Some good lines, then these."""
    whole = [*GOOD[:after], *lines]
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in whole)


def _json(*rows: Any, after: int = 0) -> bytes:
    return _lines(*map(json.dumps, rows), after=after)


def _rows(rows: Iterable[Any]) -> bytes:
    return _json(*rows)


def _labels(labels: Iterable[Any]) -> bytes:
    return _rows({"text": f"text {n}", "label": label} for n, label in enumerate(labels))


def _chat(*messages: Any) -> bytes:
    return _json({"messages": list(messages)})


# Name of the case: (name of the file, its bytes, what the message must say after the file's name).
BAD: dict[str, tuple[str, bytes, str]] = {
    "empty": ("x.jsonl", b"", "x.jsonl: it holds no examples; expected a .jsonl file"),
    "blank": ("x.jsonl", b"\n \r\n\n", "x.jsonl: it holds no examples"),
    "only a byte order mark": ("x.jsonl", b"\xef\xbb\xbf", "x.jsonl: it holds no examples"),
    "few": (
        "x.jsonl",
        _lines(*GOOD[:5]),
        "x.jsonl: it holds 5 different inputs to train on; expected at least 10",
    ),
    "one input": (
        "x.jsonl",
        _rows({"inputs": " Same\t", "output": str(n)} for n in range(50)),
        "x.jsonl: it holds 1 different inputs",
    ),
    "one class": ("x.jsonl", _labels(["yes"] * 40), "x.jsonl: every label is 'yes'; expected at least two"),
    "too many classes": (
        "x.jsonl",
        _labels(f"label {n % 300}" for n in range(900)),
        "x.jsonl: it has 300 different labels; a task has at most 256 choices",
    ),
    "long label": (
        "x.jsonl",
        _labels(["yes", "no" * 600] * 20),
        "line 2: label has 1200 characters; expected at most 1024",
    ),
    "not JSON": ("x.jsonl", _lines("{inputs: 1}", after=3), "x.jsonl, line 4: it is not JSON: "),
    "two objects on a line": ("x.jsonl", _lines(GOOD[0] + GOOD[1]), "line 1: it is not JSON: Extra data"),
    "cut short": ("x.jsonl", _lines(*GOOD)[:-10], "line 30: it is not JSON: Unterminated string"),
    "a list of objects": (
        "x.jsonl",
        _json([{"inputs": "a"}]),
        "line 1: expected a JSON object, found a list",
    ),
    "a document over many lines": (
        "x.jsonl",
        b'[\n{"inputs": "a", "output": "b"}\n]\n',
        "line 1: it is not JSON",
    ),
    "a string": ("x.jsonl", _json("a"), "line 1: expected a JSON object, found a string"),
    "duplicate keys": (
        "x.jsonl",
        _lines('{"inputs": "a", "inputs": "b", "output": "c"}', after=2),
        "line 3: the key 'inputs' appears twice",
    ),
    "NaN": ("x.jsonl", _lines('{"inputs": "a", "output": NaN}'), "line 1: it holds NaN, which is not JSON"),
    "half a surrogate": (
        "x.jsonl",
        _lines('{"inputs": "\\ud800", "output": "b"}'),
        "line 1: it holds half of a surrogate pair",
    ),
    "deep": (
        "x.jsonl",
        _lines('{"inputs": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        "line 1: it nests deeper than 32 levels",
    ),
    "a number of many digits": (
        "x.jsonl",
        _lines('{"inputs": "a", "output": ' + "9" * 5000 + "}"),
        "line 1: ",
    ),
    "latin-1": (
        "x.jsonl",
        _lines('{"inputs": "café", "output": "b"}'.encode("latin-1"), after=1),
        f"line 2: it is not UTF-8 at byte {len(GOOD[0]) + 1 + 15} of the file (0xe9, byte 15 of the line)",
    ),
    "UTF-16": ("x.jsonl", "\n".join(GOOD).encode("utf-16"), "line 1: it is UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": (
        "x.jsonl",
        "\n".join(GOOD).encode("utf-16-le"),
        "line 1: byte 1 of the file is NUL, so it is UTF-16 or no text; save it as UTF-8",
    ),
    "NUL": ("x.csv", b"inputs,output\na\0,b\n", "x.csv, line 2: byte 15 of the file is NUL"),
    "compressed": ("x.jsonl.gz", b"\x1f\x8b", "x.jsonl.gz: it is compressed; unpack it"),
    "a JSON document": ("x.json", b"[]", "x.json: expected JSON lines: one object a line"),
    "another kind": ("x.parquet", b"PAR1", "x.parquet: files that end in '.parquet' aren't read; give"),
    "no suffix": ("data", _lines(*GOOD), "data: files that end in '' aren't read; give a .jsonl file"),
    "no answer": (
        "x.jsonl",
        _json({"inputs": "a"}, after=9),
        "x.jsonl, line 10: output is missing; a line has inputs",
    ),
    "no question": (
        "x.jsonl",
        _json({"output": "a"}),
        "line 1: it has 'output', but a line has one of: inputs and",
    ),
    "no fields": ("x.jsonl", _json({}), "line 1: it has no fields, but a line has one of: "),
    "a misspelled field": (
        "x.jsonl",
        _json({"input": "a", "output": "b"}),
        "line 1: it has 'input', 'output', but a line has one of: inputs and output; prompt and completion; "
        "messages; text and label (is 'input' meant to be inputs?)",
    ),
    "another misspelled field": (
        "x.jsonl",
        _json({"prompt": "a", "completions": "b"}),
        "completion is missing; a line has prompt and completion (is 'completions' meant to be completion?)",
    ),
    "an unknown field": (
        "x.jsonl",
        _json({"text": "a", "label": "b", "id": 1}, after=0),
        "line 1: unknown field 'id'; a line has text and label alone",
    ),
    "two forms on a line": (
        "x.jsonl",
        _json({"text": "a", "inputs": "b", "output": "c"}),
        "line 1: it has fields of several forms ('inputs', 'output', 'text'); a line has one of: ",
    ),
    "two forms in a file": (
        "x.jsonl",
        _json({"text": "a", "label": "b"}, after=4),
        "line 5: it has the form text and label, but x.jsonl, line 1 has inputs and output; use one of them",
    ),
    "two names for the answer": (
        "x.jsonl",
        _json({"inputs": "a", "output": "b", "expected": "b"}),
        "line 1: output and expected are two names for the answer; leave one out",
    ),
    "an answer of null": (
        "x.jsonl",
        _json({"inputs": "a", "output": None}),
        "line 1: output must be a string, not null",
    ),
    "a number for an answer": (
        "x.jsonl",
        _json({"inputs": "a", "output": 1}),
        "output must be a string, not a number",
    ),
    "an empty answer": ("x.jsonl", _json({"inputs": "a", "output": " \n"}), "line 1: output is empty"),
    "an empty completion": (
        "x.jsonl",
        _json({"prompt": "a", "completion": ""}),
        "line 1: completion is empty",
    ),
    "an empty text": ("x.jsonl", _json({"text": "", "label": 1}), "line 1: text is empty"),
    "an empty label": ("x.jsonl", _json({"text": "a", "label": ""}), "line 1: label is empty"),
    "a label of true": (
        "x.jsonl",
        _labels([True]),
        "line 1: label must be a string or a whole number, not true",
    ),
    "a label of 0.5": (
        "x.jsonl",
        _labels([0.5]),
        "line 1: label must be a string or a whole number, not 0.5",
    ),
    "labels of two types": (
        "x.jsonl",
        _labels([1, "1"]),
        "line 2: label is a string, but a number on x.jsonl, line 1",
    ),
    "inputs as a list": (
        "x.jsonl",
        _json({"inputs": ["a"], "output": "b"}),
        "inputs must be a string, not a list",
    ),
    "no inputs in the object": (
        "x.jsonl",
        _json({"inputs": {}, "output": "b"}),
        "inputs has 0 fields; expected 1 to 32",
    ),
    "an input that is a number": (
        "x.jsonl",
        _json({"inputs": {"age": 7}, "output": "b"}),
        "line 1: inputs.age must be a string, not a number",
    ),
    "a field that is no name": (
        "x.jsonl",
        _json({"inputs": {"the age": "7"}, "output": "b"}),
        "line 1: inputs: 'the age' is no name of a template's field",
    ),
    "slots": (
        "x.jsonl",
        _json({"inputs": "a", "output": "b", "slots": "b"}),
        "slots must be a list of strings",
    ),
    "choices that vary": (
        "x.jsonl",
        _json(*({"inputs": "a", "output": "b", "choices": ["b", each]} for each in "cd")),
        "line 2: choices must be the same on every line, as on x.jsonl, line 1",
    ),
    "an answer that is no choice": (
        "x.jsonl",
        _json({"inputs": "a", "output": "b", "choices": ["c", "d"]}),
        "line 1: the answer 'b' is none of the choices",
    ),
    "a prompt of messages": (
        "x.jsonl",
        _json({"prompt": CHAT[:1], "completion": "b"}),
        "prompt must be a string, not a list",
    ),
    "one message": ("x.jsonl", _chat(CHAT[0]), "line 1: messages must be a list of at least two"),
    "no messages": (
        "x.jsonl",
        _json({"messages": "hello"}),
        "line 1: messages must be a list of at least two",
    ),
    "a chat without an answer": (
        "x.jsonl",
        _chat(*CHAT, CHAT[0]),
        "line 1: the last message must be the assistant's answer, but its role is user",
    ),
    "an empty answer of a chat": (
        "x.jsonl",
        _chat(CHAT[0], {"role": "assistant", "content": None}),
        "line 1: the assistant's last message is empty",
    ),
    "an unknown role": (
        "x.jsonl",
        _chat({"role": "bot", "content": "a"}, CHAT[1]),
        "messages[0].role must be one of",
    ),
    "a message without content": (
        "x.jsonl",
        _chat({"role": "user"}, CHAT[1]),
        "messages[0].content must be a string",
    ),
    "a picture": (
        "x.jsonl",
        _chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, CHAT[1]),
        "messages[0].content must be a string, or a list of",
    ),
    "a tool's call": (
        "x.jsonl",
        _chat(CHAT[0], CHAT[1] | {"tool_calls": [{}]}),
        "messages[1] has the unknown field 'tool_calls'; it has role, content and name",
    ),
    "a message that is a string": (
        "x.jsonl",
        _chat("hello", CHAT[1]),
        "messages[0] must be an object of role and content",
    ),
    "a table's header alone": ("x.csv", b"text,label\n", "x.csv: it holds no examples"),
    "a column twice": ("x.csv", b"text,text\na,b\n", "x.csv, line 1: the header has the column 'text' twice"),
    "a column without a name": (
        "x.csv",
        b"text,label,\na,b,c\n",
        "line 1: a column of the header has no name",
    ),
    "a missing cell": (
        "x.csv",
        b"text,label\na,b\nc\n",
        "x.csv, line 3: it has 1 cells, but the header has 2; put",
    ),
    "a cell too many": (
        "x.csv",
        b"text,label\na, b, c\n",
        "x.csv, line 2: it has 3 cells, but the header has 2; put",
    ),
    "an open quote": (
        "x.csv",
        b'text,label\na,b\n"c,d\ne,f\n',
        "line 3: it is not CSV: a quote that opens here isn't",
    ),
    "a quote in a cell": (
        "x.csv",
        b'text,label\n"a"b,c\n',
        "x.csv, line 2: it is not CSV: ',' expected after '\"'",
    ),
    "lines that end in CR": (
        "x.csv",
        b"text,label\ra,b\rc,d\r",
        "line 1: it is not CSV: a line break (CR) stands alone",
    ),
    "a table of many columns": (
        "x.csv",
        ",".join(map(str, range(500_000))).encode() + b"\n",
        "x.csv, line 1: the header has 500000 columns; expected at most 64",
    ),
    "a name of many characters": (
        "x.jsonl",
        _json({"input" * 1_000_000: 1}),
        "line 1: it has 'inputinputinput",
    ),
    "semicolons": (
        "x.csv",
        b"text;label\na;b\n",
        "x.csv, line 1: the header has one column; is ';' what separates columns here?",
    ),
    "a table's unknown column": (
        "x.tsv",
        b"text\tlabel\tid\na\tb\t1\n",
        "x.tsv, line 2: unknown field 'id'; a line has",
    ),
    "an empty cell": ("x.csv", b"text,label\na,b\nc,\n", "x.csv, line 3: label is empty"),
}


def write(case: str, directory: Path) -> tuple[Path, str]:
    """Write a bad file; return it and what the message must hold."""
    name, data, expected = BAD[case]
    path = directory / name
    path.write_bytes(data)
    return path, expected


def _huge(path: Path, unit: bytes) -> None:
    """One line of 100 MB."""
    with path.open("wb") as file:
        file.write(b'{"inputs": "')
        for _ in range(100):
            file.write(unit * (1_000_000 // len(unit)))


HUGE: dict[str, Callable[[Path], None]] = {
    "x.jsonl": lambda path: _huge(path, b"a"),
    "x.csv": lambda path: _huge(path, b"a,"),
    "x.tsv": lambda path: _huge(path, b'"'),
}
