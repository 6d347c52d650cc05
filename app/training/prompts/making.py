"""From the settings of a run to the prompt that it starts from."""

from collections.abc import Sequence

import torch

from app.errors import InvalidRequest
from app.prompt import Prompt, TaskType
from app.sites import Site
from app.training.base import TrainingBase
from app.training.prompts.learned import LearnedPrompt
from app.training.prompts.placing import is_shifted, sites_of
from app.training.prompts.prefix import Prefix, WrittenPrefix, check_frozen
from app.training.prompts.soft import MultitaskPrompt, SoftPrompt, WrittenSoftPrompt
from app.training.prompts.starts import Start
from app.training.settings import Init, Method, TrainingSettings

_PREFIXES = (Method.PREFIX, Method.CARTRIDGE)
_NETWORKS = {Method.P_TUNING: ("mlp", "lstm"), Method.PREFIX: ("none", "mlp")}  # of other methods none
_ROOM = 2  # tokens of a text and its answer


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

    Raise InvalidRequest, PromptRejected: settings that don't go together, or that the base can't take.
    """
    settings = settings.resolved(is_encoder_decoder=base.is_encoder_decoder)
    _check_network(settings)
    _check_sites(settings)
    _check_room(settings, base)
    if num_tasks > 1 and settings.method is not Method.MULTITASK:
        raise InvalidRequest("several tasks learn together with method 'multitask' only", param="method")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        begun = Start(settings, base, choices, start)
        learned = (
            _prefix(settings, base, begun)
            if settings.method in _PREFIXES
            else _soft(settings, base, begun, num_tasks)
        )
    return learned.to(base.model.device)


def _check_network(settings: TrainingSettings) -> None:
    """Raise InvalidRequest: no such network with the method, or a start that a network can't have."""
    possible = _NETWORKS.get(settings.method, ("none",))
    if settings.network not in possible:
        raise InvalidRequest(
            f"method '{settings.method}' goes with network {' or '.join(possible)}, not {settings.network}",
            param="network",
        )
    if settings.network == "none":
        return
    if settings.init is not Init.RANDOM and (settings.method, settings.init) != (Method.PREFIX, Init.ZERO):
        raise InvalidRequest(
            f"a network writes the prompt, so it can't start from init '{settings.init}'; take 'random'",
            param="init",
        )
    if settings.frozen_tokens:
        raise InvalidRequest(
            "a network writes all tokens, so none of them can be frozen", param="frozen_tokens"
        )


def _check_sites(settings: TrainingSettings) -> None:
    """Raise InvalidRequest: what is set is of prefixes, and the method learns none."""
    unread = [name for name in ("sites", "frozen_tokens") if getattr(settings, name)]
    if unread and settings.method not in _PREFIXES:
        raise InvalidRequest(
            f"method '{settings.method}' has no {unread[0]}, which a prefix has; leave it out, or take "
            "method 'prefix'",
            param=unread[0],
        )


def _task_type(base: TrainingBase) -> TaskType:
    return TaskType.SEQ_2_SEQ_LM if base.is_encoder_decoder else TaskType.CAUSAL_LM


def _soft(settings: TrainingSettings, base: TrainingBase, start: Start, num_tasks: int) -> LearnedPrompt:
    if settings.network in ("mlp", "lstm"):
        return WrittenSoftPrompt(
            _task_type(base), start.network_rows(), settings.network, settings.hidden_size
        )
    if settings.method is Method.MULTITASK:
        return MultitaskPrompt(_task_type(base), start.rows(), num_tasks)
    return SoftPrompt(_task_type(base), start.rows())


def _prefix(settings: TrainingSettings, base: TrainingBase, start: Start) -> LearnedPrompt:
    sites = sites_of(settings.sites, base)
    if settings.network == "mlp":
        return _written_prefix(settings, base, sites)
    matrices = start.matrices(sites)
    layers = {site: base.geometry.layers[site] for site in matrices}
    frozen_tokens = settings.frozen_tokens or 0
    check_frozen(frozen_tokens, min(map(len, matrices.values())))
    return Prefix(_task_type(base), start.position_offset(matrices), layers, matrices, frozen_tokens)


def _written_prefix(settings: TrainingSettings, base: TrainingBase, sites: tuple[Site, ...]) -> LearnedPrompt:
    assert settings.num_virtual_tokens is not None
    return WrittenPrefix(
        _task_type(base),
        settings.num_virtual_tokens if is_shifted(base, sites) else 0,
        {site: base.geometry.layers[site] for site in sites},
        settings.num_virtual_tokens,
        settings.hidden_size,
        is_zero=settings.init is Init.ZERO,
    )


def _check_room(settings: TrainingSettings, base: TrainingBase) -> None:
    """Raise InvalidRequest where the prompt would leave no room for a text."""
    geometry = base.geometry
    limit = min(geometry.max_positions, geometry.max_source_positions or geometry.max_positions) - _ROOM
    if (settings.num_virtual_tokens or 0) > limit:
        raise InvalidRequest(
            f"{settings.num_virtual_tokens} virtual tokens leave no room for a text; the base takes at most "
            f"{limit}",
            param="num_virtual_tokens",
        )
