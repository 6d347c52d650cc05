"""The `task` part of an upload: what an uploader may say of a version, checked field by field."""

from collections.abc import Mapping
from typing import Any

from app.errors import InvalidRequest
from app.prompt import VersionDraft
from app.serving.parameters import parse_parameters
from app.text.template import PLAIN, Template, bind_inputs, parse_template

MAX_CHOICES = 256
MAX_CHOICE_CHARS = 1024
MAX_EXAMPLES = 64
MAX_EXAMPLE_CHARS = 16_384
MAX_NOTES_CHARS = 16_384
MAX_BASE_CHARS = 512
MAX_METRICS = 64
MAX_METRIC_NAME_CHARS = 128


_KNOWN = ("template", "defaults", "choices", "examples", "notes", "base", "metrics")


def parse_task(task: Mapping[str, Any] | None) -> VersionDraft:
    """Return a draft without a prompt. Raise InvalidRequest, which names the first field at fault.

    `metrics`, measured by the trainer, are provenance and no part of the version's identity.
    """
    given = {name: value for name, value in (task or {}).items() if value is not None}
    unknown = sorted(set(given) - set(_KNOWN))
    if unknown:
        raise InvalidRequest(
            f"task has no field {', '.join(name[:64] for name in unknown[:16])}; "
            f"it knows {', '.join(_KNOWN)}.",
            param=f"task.{unknown[0][:64]}",
        )
    template = given.get("template")
    parsed = PLAIN if template is None else _template(template)
    return VersionDraft(
        prompt=None,
        template=template,
        defaults=_defaults(given.get("defaults", {})),
        choices=parse_choices(given.get("choices", []), "task.choices"),
        examples=_examples(given.get("examples", []), parsed),
        notes=_string(given.get("notes", ""), "task.notes", MAX_NOTES_CHARS),
        base=_base(given.get("base", {})),
        provenance={"metrics": _metrics(given.get("metrics", {}))},
    )


def _template(source: Any) -> Template:
    if not isinstance(source, str):
        raise InvalidRequest("task.template must be a string.", param="task.template")
    try:
        return parse_template(source)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="task.template") from None


def _string(value: Any, param: str, limit: int) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise InvalidRequest(f"{param} must be a string of at most {limit} characters.", param=param)
    return value


def _object(value: Any, param: str, required: set[str], optional: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not required <= set(value) <= required | optional:
        names = ", ".join([*sorted(required), *(f"{name} (optional)" for name in sorted(optional))])
        raise InvalidRequest(f"{param} must be an object with: {names}.", param=param)
    return value


def _list(value: Any, param: str, limit: int) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) > limit:
        raise InvalidRequest(f"{param} must be a list of at most {limit} entries.", param=param)
    return list(value)


def _defaults(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest("task.defaults must be an object.", param="task.defaults")
    parse_parameters(value, where="task.defaults")
    return {name: setting for name, setting in value.items() if setting is not None}


def parse_choices(value: Any, where: str) -> tuple[Any, ...]:
    """Check labels: strings, or objects with `value` and `text`. Raises InvalidRequest."""
    choices = _list(value, where, MAX_CHOICES)
    for index, choice in enumerate(choices):
        param = f"{where}[{index}]"
        parts = (
            [choice] if isinstance(choice, str) else _object(choice, param, {"value", "text"}, set()).values()
        )
        for part in parts:
            if not _string(part, param, MAX_CHOICE_CHARS):
                raise InvalidRequest(f"{param} must not be empty.", param=param)
    return tuple(choices)


def _examples(value: Any, template: Template) -> tuple[Mapping[str, Any], ...]:
    examples = _list(value, "task.examples", MAX_EXAMPLES)
    for index, example in enumerate(examples):
        param = f"task.examples[{index}]"
        _object(example, param, {"inputs", "expected"}, set())
        _string(example["expected"], f"{param}.expected", MAX_EXAMPLE_CHARS)
        _check_inputs(template, example["inputs"], f"{param}.inputs")
    return tuple(examples)


def _check_inputs(template: Template, inputs: Any, param: str) -> None:
    if not isinstance(inputs, str | Mapping):
        raise InvalidRequest(f"{param} must be a string or an object of strings.", param=param)
    try:
        values = bind_inputs(template, inputs)
    except InvalidRequest as error:
        raise InvalidRequest(f"{param}: {error.message}", param=param) from None
    if sum(map(len, values.values())) > MAX_EXAMPLE_CHARS:
        raise InvalidRequest(f"{param} must have at most {MAX_EXAMPLE_CHARS} characters.", param=param)


def _base(value: Any) -> Mapping[str, Any]:
    if not value and isinstance(value, Mapping):
        return {}
    base = _object(value, "task.base", {"name"}, {"revision"})
    given = {name: text for name, text in base.items() if text is not None}
    return {name: _string(text, f"task.base.{name}", MAX_BASE_CHARS) for name, text in given.items()}


def _metrics(value: Any) -> Mapping[str, float]:
    is_numbers = isinstance(value, Mapping) and all(type(number) in (int, float) for number in value.values())
    if not is_numbers or len(value) > MAX_METRICS or any(len(name) > MAX_METRIC_NAME_CHARS for name in value):
        raise InvalidRequest(
            f'task.metrics must be an object of at most {MAX_METRICS} numbers, such as {{"accuracy": 0.94}}.',
            param="task.metrics",
        )
    return dict(value)
