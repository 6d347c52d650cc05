"""From a row's fields to an example: the forms that data comes in, each field checked."""

from collections.abc import Mapping, Set
from difflib import get_close_matches
from typing import Any

from app.errors import InvalidRequest
from app.strict_json import excerpt
from app.text.message import Message
from app.text.template import FIELD_NAME, MAX_FIELDS
from app.training.data_files import Row, kind_of, refused
from app.training.examples import Example, Form, Inputs

_FIELDS: Mapping[Form, frozenset[str]] = {
    Form.INPUTS: frozenset({"inputs", "output", "expected", "answer", "slots", "choices"}),
    Form.PROMPT: frozenset({"prompt", "completion"}),
    Form.MESSAGES: frozenset({"messages"}),
    Form.LABEL: frozenset({"text", "label"}),
}
_OUTPUTS = ("output", "expected")  # two names for the same
_HEADS = {"inputs": Form.INPUTS, "prompt": Form.PROMPT, "messages": Form.MESSAGES, "text": Form.LABEL}
_KNOWN = "; ".join(Form)
_ROLES = ("system", "developer", "user", "assistant")


class FormReader:
    """Makes examples of rows, all of which have the form of the first one."""

    def __init__(self) -> None:
        self.form: Form | None = None
        self.choices: tuple[str, ...] | None = None  # as lines name them
        self._label_type: type | None = None
        self._first = ""

    def example(self, file: str, row: Row) -> Example:
        """Raise InvalidRequest, which names the line and the field that is wrong."""
        fields = _of_columns(row.fields) if row.is_table else row.fields
        try:
            form = _form_of(fields.keys())
            if self.form is None:
                self.form, self._first = form, f"{file}, line {row.line}"
            if form is not self.form:
                raise _wrong(f"it has the form {form}, but {self._first} has {self.form}; use one of them")
            self._check_fields(form, fields.keys())
            given = self._parsed(form, fields)
        except InvalidRequest as error:
            raise refused(f"{file}, line {row.line}", error.message) from None
        return Example(**given, line=row.line, file=file)

    def _check_fields(self, form: Form, names: Set[str]) -> None:
        needed = _FIELDS[form] - {"expected", "answer", "slots", "choices"}
        missing = needed - names - ({"output"} if "expected" in names else set())
        if missing:
            raise _wrong(
                f"{' and '.join(sorted(missing))} is missing; a line has {form}{_meant(names, form)}"
            )
        unknown = sorted(names - _FIELDS[form])
        if unknown:
            raise _wrong(
                f"unknown field {', '.join(excerpt(name) for name in unknown[:8])}; "
                f"a line has {form}{_optional(form)}"
            )

    def _parsed(self, form: Form, fields: Mapping[str, Any]) -> dict[str, Any]:
        if form is Form.PROMPT:
            return {"inputs": _text(fields, "prompt"), "output": _text(fields, "completion")}
        if form is Form.LABEL:
            return {"inputs": _text(fields, "text"), "output": self._label(fields["label"])}
        if form is Form.MESSAGES:
            *messages, last = _messages(fields["messages"])
            return {"messages": tuple(messages), "output": last.content}
        return self._inputs(fields)

    def _inputs(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        if all(name in fields for name in _OUTPUTS):
            raise _wrong("output and expected are two names for the answer; leave one out")
        output = _text(fields, "expected" if "expected" in fields else "output")
        self._take_choices(fields.get("choices"), output)
        return {
            "inputs": _input(fields["inputs"]),
            "output": output,
            "answer": _text(fields, "answer") if fields.get("answer") is not None else None,
            "slots": _strings(fields["slots"], "slots") if fields.get("slots") is not None else None,
        }

    def _take_choices(self, given: Any, output: str) -> None:
        choices = () if given is None else _strings(given, "choices")
        if self.choices is None:
            self.choices = choices
        if choices != self.choices:
            raise _wrong(f"choices must be the same on every line, as on {self._first}")
        if choices and output not in choices:
            raise _wrong(f"the answer {excerpt(output)} is none of the choices")

    def _label(self, label: Any) -> str:
        if isinstance(label, bool) or not isinstance(label, str | int):
            found = label if isinstance(label, float) else kind_of(label)
            raise _wrong(f"label must be a string or a whole number, not {found}")
        if self._label_type is None:
            self._label_type = type(label)
        if type(label) is not self._label_type:
            kinds = ("a number", "a string") if isinstance(label, int) else ("a string", "a number")
            raise _wrong(f"label is {kinds[0]}, but {kinds[1]} on {self._first}; use one of them")
        if isinstance(label, str) and not label.strip():
            raise _wrong("label is empty")
        return str(label)


def _of_columns(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a table's columns as fields: without inputs, prompt or text, all but the answer's are inputs."""
    if fields.keys() & _HEADS.keys() or not fields.keys() & set(_OUTPUTS):
        return fields
    own = {name: fields[name] for name in (*_OUTPUTS, "answer") if name in fields}
    return {"inputs": {name: text for name, text in fields.items() if name not in own}} | own


def _wrong(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="data")


def _form_of(names: Set[str]) -> Form:
    """Return the form whose first field is there. Raise InvalidRequest: none, or several."""
    found = [form for head, form in _HEADS.items() if head in names]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(excerpt(name) for name in sorted(names)[:8]) or "no fields"
    if found:
        raise _wrong(f"it has fields of several forms ({shown}); a line has one of: {_KNOWN}")
    raise _wrong(f"it has {shown}, but a line has one of: {_KNOWN}{_meant(names, *Form)}")


def _meant(names: Set[str], *forms: Form) -> str:
    """Return a hint where a name is nearly that of a field."""
    known = sorted(name for form in forms for name in _FIELDS[form])
    for name in sorted(names - set(known))[:8]:
        near = get_close_matches(name[:64].lower(), known, n=1, cutoff=0.75)
        if near:
            return f" (is {excerpt(name)} meant to be {near[0]}?)"
    return ""


def _optional(form: Form) -> str:
    return ", and may have answer, slots and choices" if form is Form.INPUTS else " alone"


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise _wrong(f"{name} must be a string, not {kind_of(value)}")
    if not value.strip():
        raise _wrong(f"{name} is empty")
    return value


def _strings(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise _wrong(f"{name} must be a list of strings that aren't empty")
    return tuple(values)


def _input(value: Any) -> Inputs:
    if not isinstance(value, dict):
        return _text({"inputs": value}, "inputs")
    if not 0 < len(value) <= MAX_FIELDS:
        raise _wrong(f"inputs has {len(value)} fields; expected 1 to {MAX_FIELDS}")
    for name, text in value.items():
        if not FIELD_NAME.fullmatch(name):
            raise _wrong(f"inputs: {excerpt(name)} is no name of a template's field (letters, digits, _)")
        if not isinstance(text, str):
            raise _wrong(f"inputs.{name} must be a string, not {kind_of(text)}")
    return value


def _messages(values: Any) -> list[Message]:
    if not isinstance(values, list) or len(values) < 2:
        raise _wrong("messages must be a list of at least two: what is asked, and the assistant's answer")
    messages = [_message(value, f"messages[{index}]") for index, value in enumerate(values)]
    if messages[-1].role != "assistant":
        raise _wrong(f"the last message must be the assistant's answer, but its role is {messages[-1].role}")
    if not messages[-1].content.strip():
        raise _wrong("the assistant's last message is empty")
    return messages


def _message(value: Any, where: str) -> Message:
    """Return a message as `/v1/chat/completions` makes it of the same fields."""
    if not isinstance(value, dict):
        raise _wrong(f"{where} must be an object of role and content, not {kind_of(value)}")
    unknown = sorted(value.keys() - {"role", "content", "name"})
    if unknown:
        raise _wrong(f"{where} has the unknown field {excerpt(unknown[0])}; it has role, content and name")
    role, name = value.get("role"), value.get("name")
    if role not in _ROLES:
        raise _wrong(f"{where}.role must be one of {', '.join(_ROLES)}")
    if name is not None and not isinstance(name, str):
        raise _wrong(f"{where}.name must be a string, not {kind_of(name)}")
    content = _content(value.get("content"), role, where)
    return Message("system" if role == "developer" else role, content, {} if name is None else {"name": name})


def _content(value: Any, role: str, where: str) -> str:
    if isinstance(value, str) or (value is None and role == "assistant"):
        return value or ""
    texts = [_part(part) for part in value] if isinstance(value, list) else [None]
    if None in texts:
        raise _wrong(f'{where}.content must be a string, or a list of {{"type": "text", "text": "..."}}')
    return "".join(text for text in texts if text is not None)


def _part(part: Any) -> str | None:
    """Return the text of a part of a message's content, where it is one."""
    is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
    return part["text"] if is_text and isinstance(part["text"], str) else None
