"""Generation parameters: their names, bounds and defaults.

One check serves a request's `parameters` and the `defaults` of a task's manifest, so that a task
can't carry what a request couldn't ask for. None always means "not given".
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from app.errors import InvalidRequest
from app.request import SamplingParams

DEFAULT_MAX_NEW_TOKENS = 128
MAX_NEW_TOKENS = 1_000_000
# Smaller ones would underflow in float32; this one is greedy already.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 100.0
MAX_TOP_K = 1_000_000
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_PENALTY = 2.0  # of frequency and presence, either sign
MAX_SEED = 2**63 - 1
MAX_TRUNCATE = 1_000_000
MAX_STOPS = 16
MAX_TOP_TOKENS = 20
SEED_BITS = 53  # a drawn seed survives JSON readers that have doubles only
MAX_STOP_CHARS = 256
MAX_IDS = 1024  # in a list of ids
MAX_NGRAM = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParameters:
    """What a request or a manifest may say about generation; None: not said."""

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_h: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words: tuple[str, ...] | None = None  # texts that never come
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None  # as the first token
    min_new_tokens: int | None = None  # neither EOS nor a stop of any kind before
    ignore_eos: bool | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None  # False: they are part of the text
    truncate: int | None = None
    return_full_text: bool | None = None
    top_n_tokens: int | None = None  # most probable tokens to report beside each generated one
    decoder_input_details: bool | None = None  # report the prompt's tokens and their log-probabilities

    def over(self, defaults: "GenerationParameters") -> "GenerationParameters":
        """These parameters, completed by `defaults`."""
        given = {name: value for name in _NAMES if (value := getattr(self, name)) is not None}
        return replace(defaults, **given)

    def sampling(self, seed: int) -> SamplingParams:
        """The engine's view; `seed` is used where none was given."""
        given = {name: value for name in _SAMPLING_NAMES if (value := getattr(self, name)) is not None}
        return SamplingParams(**{"seed": seed, **given})


_NAMES = tuple(field.name for field in fields(GenerationParameters))
_SAMPLING_NAMES = tuple(name for name in _NAMES if name in {field.name for field in fields(SamplingParams)})

# name: (lowest, highest, whether the lowest itself is excluded)
_INTEGERS = {
    "max_new_tokens": (1, MAX_NEW_TOKENS),
    "top_k": (0, MAX_TOP_K),
    "no_repeat_ngram_size": (0, MAX_NGRAM),
    "min_new_tokens": (0, MAX_NEW_TOKENS),
    "seed": (0, MAX_SEED),
    "truncate": (1, MAX_TRUNCATE),
    "top_n_tokens": (0, MAX_TOP_TOKENS),
}
_NUMBERS = {
    "temperature": (MIN_TEMPERATURE, MAX_TEMPERATURE, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "typical_p": (0.0, 1.0, True),
    "top_h": (0.0, 1.0, False),
    "epsilon_cutoff": (0.0, 1.0, False),
    "eta_cutoff": (0.0, 1.0, False),
    "repetition_penalty": (MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY, False),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY, False),
    "presence_penalty": (-MAX_PENALTY, MAX_PENALTY, False),
}
_TEXTS = ("stop", "bad_words")
_IDS = ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens")


def parse_parameters(values: Mapping[str, Any], *, where: str = "parameters") -> GenerationParameters:
    """Check names, types and bounds; InvalidRequest names the first field at fault, under `where`."""
    unknown = sorted(str(name)[:64] for name in values if name not in _NAMES)
    if unknown:
        raise InvalidRequest(
            f"{where} has no field {', '.join(unknown[:16])}; it knows {', '.join(_NAMES)}.",
            param=f"{where}.{unknown[0]}",
        )
    given = {name: value for name, value in values.items() if value is not None}
    return GenerationParameters(
        **{name: _check(name, value, f"{where}.{name}") for name, value in given.items()}
    )


def _check(name: str, value: Any, param: str) -> Any:
    if name in _INTEGERS:
        return _integer(value, *_INTEGERS[name], param)
    if name in _NUMBERS:
        return _number(value, *_NUMBERS[name], param)
    if name in _TEXTS:
        return _texts(value, param)
    if name in _IDS:
        return _ids(value, param)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{param} must be true or false.", param=param)
    return value


def _integer(value: Any, low: int, high: int, param: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{param} must be a whole number from {low} to {high}.", param=param)
    return value


def _number(value: Any, low: float, high: float, above: bool, param: str) -> float:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not valid or (above and value == low):
        bound = f"above {low:g}, at most {high:g}" if above else f"from {low:g} to {high:g}"
        hint = "; for greedy decoding leave do_sample out" if param.endswith("temperature") else ""
        raise InvalidRequest(f"{param} must be a number {bound}{hint}.", param=param)
    return float(value)


def _texts(value: Any, param: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_STOPS:
        raise InvalidRequest(f"{param} must be a list of at most {MAX_STOPS} strings.", param=param)
    if not all(isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_CHARS for stop in value):
        raise InvalidRequest(
            f"{param}: each must be a string of 1 to {MAX_STOP_CHARS} characters.", param=param
        )
    return tuple(dict.fromkeys(value))


def _ids(value: Any, param: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_IDS:
        raise InvalidRequest(f"{param} must be a list of at most {MAX_IDS} token ids.", param=param)
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in value):
        raise InvalidRequest(f"{param}: each must be a whole number, 0 or more.", param=param)
    return tuple(dict.fromkeys(value))
