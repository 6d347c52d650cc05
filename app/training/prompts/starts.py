"""Where a prompt starts from: real words, another prompt, or numbers drawn. p virtual tokens, d width."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from app.errors import InvalidRequest
from app.models.attention.prefixed import Seen
from app.models.own_tensors import embedding_after_prompts
from app.models.packed_model import tensor_of
from app.prompt import Prompt, PromptKind
from app.sites import Embedding, Site
from app.store.validation import validate_prompt
from app.text.template import PLAIN
from app.training.base import TrainingBase
from app.training.prompts.placing import is_shifted
from app.training.prompts.prefix import joined
from app.training.settings import Init, TrainingSettings

INSTRUCTION = "Read the input, then write the output that belongs to it, and nothing else."


class Start:
    """The numbers of one run's prompt before the first step."""

    def __init__(
        self,
        settings: TrainingSettings,
        base: TrainingBase,
        choices: Sequence[str] = (),
        other: Prompt | None = None,
    ) -> None:
        """`settings` are resolved; `other` is another task's prompt, for init 'task'.

        Raise InvalidRequest: init 'task' without a prompt, or the reverse; init 'labels' without choices.
        """
        assert settings.init is not None
        self._init = settings.init
        self._num_tokens = settings.num_virtual_tokens
        self._text = INSTRUCTION if settings.init_text is None else settings.init_text
        self._has_sites = settings.sites is not None
        self._choices = choices
        self._base = base
        self._other = other
        if (self._init is Init.TASK) != (other is not None):
            raise InvalidRequest("init 'task' and the prompt to start from belong together", param="init")
        if self._init is Init.LABELS and not choices:
            raise InvalidRequest("init 'labels' needs the task's choices, and there are none", param="init")

    @property
    def _p(self) -> int:
        assert self._num_tokens is not None, "only another task's prompt gives the number"
        return self._num_tokens

    def network_rows(self) -> Tensor:
        """Return what a network reads: normal numbers `[p, d]`, as PEFT's networks do."""
        return torch.randn(self._p, self._base.geometry.hidden_size)

    def rows(self) -> Tensor:
        """Return rows of a soft prompt `[p, d]` in float32, as the base embeds tokens."""
        if self._other is not None:
            return self._rows_of(self._other)
        if self._init is Init.TEXT:
            return self._embedded(_repeated(_ids_of(self._base, self._text), self._p))
        drawn = self._embedded(_drawn_ids(self._base, self._p))
        if self._init is Init.LABELS:  # Lester et al., 2021
            labels = [self._embedded(_ids_of(self._base, choice)).mean(0) for choice in self._choices]
            return torch.cat([torch.stack(labels), drawn])[: self._p]
        return self._drawn_like(drawn)

    def matrices(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Return a prefix's matrix `[p, width]` of each site (prefix.py) in float32.

        Those of words are what the base's layers make of them. Raise InvalidRequest: another task's prefix is
        at other sites.
        """
        if self._other is not None:
            return self._matrices_of(self._other, sites)
        if self._init is Init.TEXT:
            ids = _ids_of(self._base, self._text)
        elif self._init is Init.LABELS:
            ids = _ids_of(self._base, " ".join(self._choices))
        else:
            ids = _drawn_ids(self._base, self._p)
        found = keys_and_values(self._base, _beginning(self._base, ids, self._p))
        return {site: self._drawn_like(found[site][: self._p]) for site in sites}

    def position_offset(self, matrices: Mapping[Site, Tensor]) -> int:
        """Return the position of the decoder's first token after a prefix with these matrices."""
        other = self._other
        counts = is_shifted(self._base, tuple(matrices)) if other is None else other.position_offset > 0
        return len(matrices[Site.DECODER_SELF]) if counts else 0

    def _drawn_like(self, real: Tensor) -> Tensor:
        """Return numbers of real words; or normal ones with the spread of each column of these, or zeros."""
        if self._init is Init.ZERO:
            return torch.zeros_like(real)
        if self._init is Init.RANDOM:
            return torch.randn_like(real) * real.square().mean(0).sqrt()
        return real

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return embed_after_prompt(self._base, torch.tensor(ids, device=self._base.model.device)).float()

    def _rows_of(self, other: Prompt) -> Tensor:
        place = Embedding.ENCODER if self._base.is_encoder_decoder else Embedding.DECODER
        _check_other(other, PromptKind.SOFT, self._base)
        if other.tensors.keys() != {place}:
            found = ", ".join(other.tensors)
            raise InvalidRequest(f"the prompt to start from is at {found}, not at {place}", param="init")
        return self._shortened(tensor_of(other, place).float())

    def _matrices_of(self, other: Prompt, sites: Sequence[Site]) -> dict[Site, Tensor]:
        _check_other(other, PromptKind.PREFIX, self._base)
        found = [site for site in self._base.geometry.layers if other.length(site)]
        if self._has_sites and set(found) != {*sites}:
            raise InvalidRequest(
                f"the prompt to start from is at {', '.join(found)}, not at {', '.join(sites)}; leave the "
                "sites out, or name these",
                param="sites",
            )
        pairs = {
            site: [
                (tensor_of(other, site.tensor(layer, "k")), tensor_of(other, site.tensor(layer, "v")))
                for layer in range(len(layers))
            ]
            for site, layers in self._base.geometry.layers.items()
            if site in found
        }
        return {site: self._shortened(joined(each).float()) for site, each in pairs.items()}

    def _shortened(self, rows: Tensor) -> Tensor:
        if self._num_tokens is not None and self._num_tokens > len(rows):
            raise InvalidRequest(
                f"the prompt to start from has {len(rows)} virtual tokens, not {self._num_tokens}; "
                "leave the number out, or take fewer",
                param="num_virtual_tokens",
            )
        return rows[: self._num_tokens]


def _check_other(other: Prompt, kind: PromptKind, base: TrainingBase) -> None:
    """Raise InvalidRequest: it is of another kind. Raise PromptRejected: it is for another base."""
    if other.kind is not kind:
        raise InvalidRequest(
            f"the prompt to start from is of kind {other.kind}, and the method learns one of kind {kind}; "
            "take a version of the same kind, or another method",
            param="init",
        )
    validate_prompt(other, base.geometry)


def embed_after_prompt(base: TrainingBase, ids: Tensor) -> Tensor:
    """Return the embeddings `[..., d]` of ids that follow a soft prompt, as serving has them."""
    model = base.model
    embedding = embedding_after_prompts(model) if base.is_encoder_decoder else model.get_input_embeddings()
    rows: Tensor = embedding(ids)
    return rows


@torch.no_grad()
def keys_and_values(base: TrainingBase, ids: Sequence[int]) -> dict[Site, Tensor]:
    """Return what each layer makes of a text, as a matrix `[tokens, width]` of each site, in float32.

    An encoder-decoder reads the text on both sides; its decoder reads the start token first.
    """
    row = torch.tensor([ids], device=base.model.device)
    seen: Seen = {}
    if base.is_encoder_decoder:
        decoder_row = torch.cat([row.new_full((1, 1), base.decoder_start_id or 0), row], dim=1)
        base.model(input_ids=row, decoder_input_ids=decoder_row, use_cache=False, seen=seen)
    else:
        cache = DynamicCache()  # without the configuration, which would drop what left a window
        base.model(input_ids=row, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seen = {(Site.DECODER_SELF, n): (layer.keys, layer.values) for n, layer in enumerate(cache.layers)}  # type: ignore[union-attr, misc]
    return {
        site: joined([(seen[site, n][0][0], seen[site, n][1][0]) for n in range(len(layers))]).float()
        for site, layers in base.geometry.layers.items()
    }


def _ids_of(base: TrainingBase, text: str) -> tuple[int, ...]:
    ids = base.encoder.tokenizer.plain_ids(text)
    if not ids:
        raise InvalidRequest("the text that the prompt starts from has no tokens", param="init_text")
    return ids


def _beginning(base: TrainingBase, ids: Sequence[int], number: int) -> list[int]:
    """Return so many ids: what every text of the base begins with (BOS), then these, repeated."""
    before = base.encoder.tokenizer.leading_ids(PLAIN)[: number - 1]
    return [*before, *_repeated(ids, number - len(before))]


def _repeated(ids: Sequence[int], number: int) -> list[int]:
    return (list(ids) * -(-number // len(ids)))[:number]


def _drawn_ids(base: TrainingBase, number: int) -> tuple[int, ...]:
    """Draw tokens of the tokenizer; rows beyond it may never have been trained."""
    return tuple(torch.randint(min(len(base.tokenizer), base.geometry.vocab_size), (number,)).tolist())
