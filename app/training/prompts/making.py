"""From the settings of a run to the prompt that it starts from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from app.errors import InvalidRequest
from app.prompt import Prompt, PromptKind, TaskType
from app.sites import Embedding, Site
from app.training.base import TrainingBase
from app.training.prompts.learned import LearnedPrompt
from app.training.prompts.prefix import Prefix, WrittenPrefix
from app.training.prompts.soft import MultitaskPrompt, SoftPrompt, WrittenSoftPrompt
from app.training.prompts.starts import check_start, embedding_rows, matrices_of, rows_of, site_matrices
from app.training.settings import Init, Method, TrainingSettings

_SOFT = (Method.PROMPT, Method.P_TUNING, Method.MULTITASK)


def new_prompt(
    settings: TrainingSettings,
    base: TrainingBase,
    *,
    choices: Sequence[str] = (),
    start: Prompt | None = None,
    num_tasks: int = 1,
) -> LearnedPrompt:
    """Return the prompt before its first step; what is drawn depends on the seed alone.

    `choices` are the task's, for init 'labels'; `start` is another task's prompt, for init 'task'.
    `num_tasks` learn together, with method 'multitask'.

    Raise InvalidRequest (PromptRejected): settings that don't go together, or that the base can't take.
    """
    settings = settings.resolved(is_encoder_decoder=base.is_encoder_decoder)
    _check(settings, base, start, num_tasks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        made = (_soft if settings.method in _SOFT else _prefix)(settings, base, choices, start, num_tasks)
    return made.to(base.model.device)


def _check(settings: TrainingSettings, base: TrainingBase, start: Prompt | None, num_tasks: int) -> None:
    if (settings.init is Init.TASK) != (start is not None):
        raise InvalidRequest("init 'task' and the prompt to start from belong together", param="init")
    if start is not None:
        check_start(base, start, PromptKind.SOFT if settings.method in _SOFT else PromptKind.PREFIX)
    if num_tasks > 1 and settings.method is not Method.MULTITASK:
        raise InvalidRequest("several tasks learn together with method 'multitask' only", param="method")
    if settings.method not in _SOFT and not base.geometry.takes_prefixes:
        raise InvalidRequest(
            f"'{base.geometry.architecture}' keeps something else than keys and values of each head, so it "
            "takes no prefix; train a soft prompt (method 'prompt')",
            param="method",
        )
    if settings.network == "lstm" and settings.method is not Method.P_TUNING:
        raise InvalidRequest("network 'lstm' goes with method 'p-tuning'; take 'mlp'", param="network")


def task_type_of(base: TrainingBase) -> TaskType:
    """Return the kind of base that a prompt is for."""
    return TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM


def _soft(
    settings: TrainingSettings,
    base: TrainingBase,
    choices: Sequence[str],
    start: Prompt | None,
    num_tasks: int,
) -> LearnedPrompt:
    task_type = task_type_of(base)
    if settings.method is Method.P_TUNING:
        if settings.init is not Init.RANDOM:
            raise InvalidRequest(
                "p-tuning's network is drawn, so nothing else can be where it starts; take init 'random'",
                param="init",
            )
        assert settings.num_virtual_tokens is not None
        rows = torch.randn(settings.num_virtual_tokens, base.geometry.hidden_size)
        assert settings.network in ("mlp", "lstm")
        return WrittenSoftPrompt(task_type, rows, settings.network, settings.hidden_size)
    rows = _start_rows(settings, base, choices, start)
    if settings.method is Method.MULTITASK:
        return MultitaskPrompt(task_type, rows, num_tasks)
    return SoftPrompt(task_type, rows)


def _start_rows(
    settings: TrainingSettings, base: TrainingBase, choices: Sequence[str], start: Prompt | None
) -> Tensor:
    if start is not None:
        place = Embedding.ENCODER if base.is_encoder_decoder else Embedding.DECODER
        return _shortened(rows_of(start, place), settings.num_virtual_tokens)
    assert settings.num_virtual_tokens is not None
    assert settings.init is not None
    return embedding_rows(base, settings.num_virtual_tokens, settings.init, settings.init_text, choices)


def _prefix(
    settings: TrainingSettings,
    base: TrainingBase,
    choices: Sequence[str],
    start: Prompt | None,
    num_tasks: int,
) -> LearnedPrompt:
    if start is None:
        assert settings.num_virtual_tokens is not None
        sites, p = _sites(settings, base), settings.num_virtual_tokens
        is_shifted = _is_shifted(base, sites)
    else:
        matrices = {
            site: _shortened(matrix, settings.num_virtual_tokens)
            for site, matrix in matrices_of(start, base).items()
        }
        sites, p = tuple(matrices), max(map(len, matrices.values()))
        is_shifted = start.position_offset > 0
    layers = {site: base.geometry.layers[site] for site in sites}
    offset = p if is_shifted else 0
    if settings.network == "mlp":
        if settings.init not in (Init.RANDOM, Init.ZERO):
            raise InvalidRequest(
                "the network that writes the prefix is drawn; take init 'random' or 'zero', or no network",
                param="init",
            )
        is_zero = settings.init is Init.ZERO
        return WrittenPrefix(task_type_of(base), offset, layers, p, settings.hidden_size, is_zero=is_zero)
    if start is None:
        assert settings.init is not None
        matrices = site_matrices(base, sites, p, settings.init, settings.init_text, choices)
    return Prefix(task_type_of(base), offset, layers, matrices, settings.frozen_tokens or 0)


def possible_sites(base: TrainingBase) -> tuple[Site, ...]:
    """Return the attention sites at which the base takes a prefix, as `validate_prompt` has it."""
    layers = base.geometry.layers
    biased = {site for site in layers if any(layer.has_position_bias for layer in layers[site])}
    return tuple(
        site for site in Site if site in layers and not (site is Site.ENCODER_SELF and site in biased)
    )


def _sites(settings: TrainingSettings, base: TrainingBase) -> tuple[Site, ...]:
    possible = possible_sites(base)
    wanted = settings.sites or possible
    if not set(wanted) <= set(possible):
        raise InvalidRequest(
            f"'{base.geometry.architecture}' takes prefixes at {', '.join(possible)}, and not at "
            f"{', '.join(sorted(set(wanted) - set(possible)))}",
            param="sites",
        )
    return tuple(site for site in possible if site in wanted)


def _is_shifted(base: TrainingBase, sites: Sequence[Site]) -> bool:
    """Return whether the decoder's positions count its prefix: where PEFT has it so, and with biases.

    PEFT's prefixes are in the decoder alone. Those at several sites leave positions as they are, as in the
    repository of Li and Liang, but for scores that get a bias by distance, which a key at no position lacks.
    """
    if Site.DECODER_SELF not in sites:
        return False
    is_biased = any(layer.has_position_bias for layer in base.geometry.layers[Site.DECODER_SELF])
    return is_biased or len(sites) == 1


def _shortened(rows: Tensor, number: int | None) -> Tensor:
    if number is not None and number > len(rows):
        raise InvalidRequest(
            f"the prompt to start from has {len(rows)} virtual tokens, and {number} are wanted; leave the "
            "number out, or take fewer",
            param="num_virtual_tokens",
        )
    return rows[:number]
