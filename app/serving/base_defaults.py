"""What a base's generation config says of answers: defaults below a manifest's and a request's own.

All fields of `transformers.GenerationConfig` are known here: those that a request may have too, those that
only a base has, and those that can't be honoured. The others don't change an answer (caches, outputs,
speculation), or are another's business: EOS ids are read at load, `do_sample` is each route's own matter.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.errors import InvalidRequest
from app.serving.parameters import DECLARED, Layer, parse_parameters
from app.strict_json import is_one_of

log = logging.getLogger("promptplex")

MAX_SEQUENCE = 64  # ids of a sequence that is banned or biased

_AS_IN_REQUESTS = (*(name for name, each in DECLARED.items() if each.in_base), "stop_strings")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # beside None
    **{
        name: ([] if each.default == () else each.default,) for name, each in DECLARED.items() if each.in_base
    },
    "min_new_tokens": (0,),
    "stop_strings": ([],),
    "min_length": (0,),
    "bad_words_ids": ([],),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
}
# What can't be honoured, and the values that change nothing.
_NOT_HONOURED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
    "max_time": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRules:
    """What only a base says. Lengths count the ids of the prompt's text too, as in `transformers`."""

    max_length: int | None = None
    min_length: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    encoder_no_repeat_ngram_size: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDefaults:
    """A base's own defaults, as they are used."""

    parameters: Layer = field(default_factory=dict)
    rules: BaseRules = field(default_factory=BaseRules)
    shown: Mapping[str, Any] = field(default_factory=dict)  # what is used, by transformers' names, as JSON
    not_honoured: tuple[str, ...] = ()  # a line each


def base_defaults(values: Mapping[str, Any]) -> BaseDefaults:
    """Read the fields of a generation config, apart from those that are neutral or unset."""
    given = {
        name: value
        for name, value in values.items()
        if value is not None and not is_one_of(value, _NEUTRAL.get(name, ()))
    }
    ignored = [
        f"{name} = {_short(given[name])} is not supported"
        for name, neutral in _NOT_HONOURED.items()
        if name in given and not is_one_of(given[name], neutral)
    ]
    parameters: dict[str, Any] = {}
    rules: dict[str, Any] = {}
    for name in [name for name in given if name in _AS_IN_REQUESTS or name in _RULES]:
        try:
            if name in _RULES:
                rules[name] = _RULES[name](given[name])
            else:
                parameters |= _parameter(name, given[name])
        except (InvalidRequest, TypeError, ValueError) as error:
            ignored.append(f"{name} = {_short(given.pop(name))} can't be used: {error}")
    return BaseDefaults(
        parameters=parameters,
        rules=BaseRules(**rules),
        shown={name: _as_json(value) for name, value in given.items() if name in {*_AS_IN_REQUESTS, *_RULES}},
        not_honoured=tuple(ignored),
    )


def reported_defaults(values: Mapping[str, Any]) -> BaseDefaults:
    """Read them, and log what is used and what is not supported."""
    defaults = base_defaults(values)
    if defaults.shown:
        names = ", ".join(f"{name} {value}" for name, value in defaults.shown.items())
        log.info("the base's generation config gives defaults: %s", names[:1000])
    for line in defaults.not_honoured:
        log.warning("the base's generation config: %s", line)
    return defaults


def _parameter(name: str, value: Any) -> dict[str, Any]:
    """Return a value that requests may set too, by the name that it has there."""
    if name == "stop_strings":
        name, value = "stop", [value] if isinstance(value, str) else value
    return parse_parameters({name: value}, where="generation_config")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _as_json(value: Any) -> Any:
    """Return the value as JSON, which has no infinity and only strings as keys."""
    if isinstance(value, Mapping):
        return [[list(ids), _as_json(bias)] for ids, bias in value.items()]
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("it must be a whole number, 0 or more")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError("it must be a number above 0")
    return float(value)


def _sequence(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_SEQUENCE:
        raise ValueError(f"each must be a list of 1 to {MAX_SEQUENCE} token ids")
    return tuple(_whole(id_) for id_ in value)


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple((_sequence(ids), float(bias)) for ids, bias in pairs)


def _decay(value: Any) -> tuple[int, float]:
    begin, factor = value
    return _whole(begin), _positive(factor)


def _one_or_more(value: Any) -> tuple[int, ...]:
    return _sequence(value if isinstance(value, list | tuple) else [value])


_RULES = {
    "max_length": _whole,
    "min_length": _whole,
    "bad_words_ids": lambda value: tuple(_sequence(ids) for ids in value),
    "sequence_bias": _biases,
    "encoder_repetition_penalty": _positive,
    "encoder_no_repeat_ngram_size": _whole,
    "forced_bos_token_id": _whole,
    "forced_eos_token_id": _one_or_more,
    "exponential_decay_length_penalty": _decay,
}
