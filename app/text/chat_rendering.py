"""Chat templates, run as transformers runs them, on text that remembers where it comes from.

The environment is transformers' own in all that a template can see. What the template's source writes out
is the template's own text; everything else that comes out is a message's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jinja2 import nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import do_indent, do_join
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from app.errors import RequestTooLong
from app.text.template import MAX_RENDERED_CHARS
from app.text.tracked_text import TrackedText, concatenated, formatted, own_text

MAX_STEPS = 1_000_000  # rounds of loops and calls of one rendering: about a second

_steps: ContextVar[int] = ContextVar("steps of the rendering under way")


class ChatRenderer:
    """One compiled chat template. Used from many threads."""

    def __init__(self, source: str) -> None:
        """Raise jinja2's TemplateError where the source is no template."""
        origin = _compile_jinja_template(source).environment
        environment = _Environment(
            trim_blocks=origin.trim_blocks,
            lstrip_blocks=origin.lstrip_blocks,
            extensions=[type(each) for each in origin.extensions.values()],
            optimized=False,  # folded constants would lose their marks
        )
        environment.globals = origin.globals
        environment.filters = {**origin.filters, "join": _join, "indent": _indent, _COUNTED: _counted}
        self._template = environment.from_string(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> TrackedText:
        """Return the text of a chat; `tokens` are names of special tokens, which are the template's own text.

        With `add_generation_prompt` the next answer's beginning comes last. Raise what the template raises.
        """
        token = _steps.set(0)
        try:
            rendered: object = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **_owned(tokens),
            )
        finally:
            _steps.reset(token)
        assert isinstance(rendered, TrackedText)
        return rendered


def foreign(value: Any) -> Any:
    """Return the data of a message, with all its texts marked as foreign."""
    if isinstance(value, str):
        return TrackedText(value)
    if isinstance(value, Mapping):
        return {name: foreign(each) for name, each in value.items()}
    return [foreign(each) for each in value] if isinstance(value, list | tuple) else value


def _owned(tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: own_text(value) if isinstance(value, str) else [own_text(str(each)) for each in value]
        for name, value in tokens.items()
    }


class _OwnConstants(CodeGenerator):
    """Writes the source's strings as texts of its own."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.value, str):
            self.write(self._output_const_repr([node.value]))
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for each in node.nodes:
            self.write("str(")
            self.visit(each, frame)
            self.write("), ")
        self.write("))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.own({''.join(group)!r})"


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _OwnConstants

    own = staticmethod(lru_cache(own_text))

    @staticmethod
    def concat(parts: Iterable[str]) -> TrackedText:
        return concatenated(_bounded(parts))

    def call(__self, __context: Context, __callable: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _take_step()
        return super().call(__context, __callable, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        made = super().wrap_str_format(value)
        if made is None or value.__name__ != "format":
            return made
        return lambda *values, **named: formatted(value.__self__, values, named, made(*values, **named))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        return template


_COUNTED = "counted rounds"  # no filter of a template can have a name with a space


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _take_step()
        yield item


def _take_step() -> None:
    steps = _steps.get() + 1
    if steps > MAX_STEPS:
        raise RequestTooLong(
            f"The base's chat template takes more than {MAX_STEPS} steps over these messages; send fewer.",
            param="messages",
        )
    _steps.set(steps)


def _bounded(parts: Iterable[str]) -> Iterator[str]:
    size = 0
    for part in parts:
        size += len(part)
        if size > MAX_RENDERED_CHARS:
            raise RequestTooLong(
                f"The rendered chat has more than {MAX_RENDERED_CHARS} characters; send fewer or shorter "
                "messages.",
                param="messages",
            )
        yield part


@pass_eval_context
def _join(context: EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    between = d if isinstance(d, TrackedText) else TrackedText(d)
    return str(do_join(context, value, between, attribute))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(s, TrackedText):
        return do_indent(s, width, first, blank)
    before = TrackedText(width if isinstance(width, str) else " " * width)
    begin, *others = (s + "\n").splitlines()
    rest = (before + line if line or blank else line for line in others)
    return TrackedText("\n").join([before + begin if first else begin, *rest])
