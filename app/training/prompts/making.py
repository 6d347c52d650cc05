"""From the settings of a run to the prompt that it starts from."""

from collections.abc import Sequence

import torch

from app.errors import InvalidRequest
from app.prompt import Prompt, TaskType
from app.sites import Site
from app.training.base import TrainingBase
from app.training.prompts.learned import LearnedPrompt
from app.training.prompts.prefix import Prefix, WrittenPrefix
from app.training.prompts.soft import MultitaskPrompt, SoftPrompt, WrittenSoftPrompt
from app.training.prompts.starts import Start
from app.training.settings import Init, Method, TrainingSettings

_PREFIXES = (Method.PREFIX, Method.CARTRIDGE)


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


_NETWORKS = {  # that a method's prompt may be written by
    Method.P_TUNING: ("mlp", "lstm"),
    Method.PREFIX: ("none", "mlp"),
}


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
    if not base.geometry.takes_prefixes:
        raise InvalidRequest(
            f"'{base.geometry.architecture}' keeps something else than keys and values of each head, so it "
            "takes no prefix; train a soft prompt (method 'prompt')",
            param="method",
        )
    matrices = start.matrices(_sites(settings, base))
    layers = {site: base.geometry.layers[site] for site in matrices}
    offset = len(matrices[Site.DECODER_SELF]) if _is_shifted(base, tuple(matrices)) else 0
    if settings.network == "mlp":
        assert settings.num_virtual_tokens is not None
        p, is_zero = settings.num_virtual_tokens, settings.init is Init.ZERO
        return WrittenPrefix(_task_type(base), offset, layers, p, settings.hidden_size, is_zero=is_zero)
    frozen_tokens, fewest = settings.frozen_tokens or 0, min(map(len, matrices.values()))
    if frozen_tokens >= fewest:
        raise InvalidRequest(
            f"{frozen_tokens} of {fewest} virtual tokens frozen leave none to learn", param="frozen_tokens"
        )
    return Prefix(_task_type(base), offset, layers, matrices, frozen_tokens)


def _sites(settings: TrainingSettings, base: TrainingBase) -> tuple[Site, ...]:
    """Return where the prefix goes. Raise InvalidRequest: the base takes none there."""
    possible = tuple(site for site in base.geometry.layers if site not in _without_distance(base))
    wanted = settings.sites or possible
    if impossible := [site for site in wanted if site not in possible]:
        raise InvalidRequest(
            f"'{base.geometry.architecture}' takes prefixes at {', '.join(sorted(possible))}, not at "
            f"{', '.join(impossible)}",
            param="sites",
        )
    return tuple(site for site in possible if site in wanted)


def _biased(base: TrainingBase) -> set[Site]:
    """Return the sites where scores get a bias by the distance of key and query (T5)."""
    layers = base.geometry.layers
    return {site for site in layers if any(layer.has_position_bias for layer in layers[site])}


def _without_distance(base: TrainingBase) -> set[Site]:
    """Return the sites where a prefix has no defined bias: nothing in an encoder stands before its tokens."""
    return _biased(base) - {Site.DECODER_SELF}


def _is_shifted(base: TrainingBase, sites: Sequence[Site]) -> bool:
    """Return whether the decoder's positions count its prefix.

    They do where PEFT's do, in the decoder alone, and where scores get a bias by distance, which a key at no
    position lacks. Prefixes at several sites leave positions as they are, as those of Li and Liang do.
    """
    alone = tuple(sites) == (Site.DECODER_SELF,)
    return Site.DECODER_SELF in sites and (alone or Site.DECODER_SELF in _biased(base))
