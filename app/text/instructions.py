"""What stands around the inputs in a version's texts: worked examples, lines of options, steps so far.

The examples and the options are the author's, as the template is: text that all requests share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from app.errors import InvalidRequest
from app.text.template import MAX_TEMPLATE_CHARS, Template, bind_inputs, joined

SO_FAR = "so_far"  # the field for all steps of a chain
LAST = "last"  # the field for the last one
OPTIONS = "options"
SHOT_END = "\n\n"


@dataclass(frozen=True, slots=True)
class Shot:
    """A worked example: inputs, and the output that stands behind them."""

    inputs: str | Mapping[str, str]
    output: str


def with_options(template: Template, options: Sequence[str]) -> Template:
    """Put a line for each option where `{options}` stands; without options it is a field like others."""
    if not options or OPTIONS not in template.fields:
        return template
    return template.filled({OPTIONS: option_lines(options)})


def option_lines(options: Sequence[str]) -> str:
    """Return a line for each option, as instruction-tuned models know them."""
    return "\n".join(f"- {option.strip()}" for option in options)


@dataclass(frozen=True, slots=True)
class Rendering:
    """One way in which a version puts a request's inputs into text."""

    template: Template  # what the model reads, with all that is constant in it
    asked: Template  # its fields are those of a request's inputs
    fed: str | None = None  # a chain's field for its steps, SO_FAR or LAST; None: no chain
    step_end: str | None = None

    @property
    def first(self) -> Template:
        """Return the template of what is read before there are steps, with the fields of the inputs."""
        if self.fed == SO_FAR:
            return self.template.filled({SO_FAR: ""})
        return self.template.renamed(LAST, self.asked.fields[0]) if self.fed == LAST else self.template

    def values(self, inputs: str | Mapping[str, str], steps: Sequence[str] = ()) -> Mapping[str, str]:
        """Return the values of the template's fields; `steps` are a chain's so far, each with its end.

        Raise InvalidRequest, which names the fields of the inputs that differ.
        """
        given = bind_inputs(self.asked, inputs)
        if self.fed == SO_FAR:
            given[SO_FAR] = "".join(steps)
        elif self.fed == LAST:
            given[LAST] = steps[-1].removesuffix(self.step_end or "") if steps else _only(given)
        return {name: given[name] for name in self.template.fields}

    def text(self, inputs: str | Mapping[str, str], steps: Sequence[str] = ()) -> str:
        """Return the whole text. Raise InvalidRequest, as `values`."""
        return joined(self.template.render(self.values(inputs, steps)))

    def with_shots(self, shots: Sequence[Shot]) -> "Rendering":
        """Put worked examples before all: each is the text of its inputs, its output and a blank line.

        Raise InvalidRequest, which names the example at fault: other inputs, or too much text.
        """
        if not shots:
            return self
        size, texts = len(self.template.source), []
        for index, shot in enumerate(shots):
            try:
                values = self.values(shot.inputs)
            except InvalidRequest as error:
                raise InvalidRequest(error.message, param=f"few_shot[{index}].inputs") from None
            size += self.template.num_chars(values) + len(shot.output) + len(SHOT_END)
            if size > MAX_TEMPLATE_CHARS:
                raise InvalidRequest(
                    f"the examples up to here and the template have {size} characters, more than "
                    f"{MAX_TEMPLATE_CHARS}; send fewer or shorter ones",
                    param=f"few_shot[{index}]",
                )
            texts.append(joined(self.template.render(values)) + shot.output + SHOT_END)
        return replace(self, template=self.template.after("".join(texts)))


def _only(values: Mapping[str, str]) -> str:
    [value] = values.values()
    return value
