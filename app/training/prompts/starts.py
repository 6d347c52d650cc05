"""Where a prompt starts from: real words, another prompt, or numbers drawn. p virtual tokens, d width."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from app.errors import InvalidRequest
from app.models.attention.prefixed import Seen
from app.models.own_tensors import embedding_after_prompts
from app.models.packed_model import tensor_of
from app.prompt import Prompt, PromptKind
from app.sites import SIDES, Site
from app.store.validation import validate_prompt
from app.text.template import PLAIN
from app.training.base import TrainingBase
from app.training.prompts.prefix import joined
from app.training.settings import Init

_INSTRUCTION = "Read the input, then write the output that belongs to it, and nothing else."


def text_of(text: str | None, choices: Sequence[str], init: Init) -> str:
    """Return the words that a prompt starts from. Raise InvalidRequest: labels, and the task has none."""
    if init is not Init.LABELS:
        return _INSTRUCTION if text is None else text
    if not choices:
        raise InvalidRequest("init 'labels' needs the task's choices, and there are none", param="init")
    return " ".join(choices)


def embedding_rows(
    base: TrainingBase, num_tokens: int, init: Init, text: str | None, choices: Sequence[str]
) -> Tensor:
    """Return rows `[p, d]` in float32, as the base embeds tokens."""
    if init is Init.ZERO:
        return torch.zeros(num_tokens, base.geometry.hidden_size, device=base.model.device)
    drawn = _embedded(base, _drawn_ids(base, num_tokens))
    if init is Init.VOCABULARY:
        return drawn
    if init is Init.RANDOM:
        return torch.randn_like(drawn) * _typical(drawn)
    words = text_of(text, choices, init)
    if init is Init.TEXT:
        return _embedded(base, _repeated(_ids_of(base, words), num_tokens))
    labels = [_embedded(base, _ids_of(base, choice)).mean(0) for choice in choices]
    return torch.cat([torch.stack(labels), drawn])[:num_tokens]  # Lester et al., 2021


def _embedded(base: TrainingBase, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        rows: Tensor = embed_after_prompt(base, torch.tensor(ids, device=base.model.device))
    return rows.float()


def embed_after_prompt(base: TrainingBase, ids: Tensor) -> Tensor:
    """Return the embeddings of the ids that follow a soft prompt, as serving has them."""
    model = base.model
    embedding = embedding_after_prompts(model) if base.is_encoder_decoder else model.get_input_embeddings()
    rows: Tensor = embedding(ids)
    return rows


def site_matrices(
    base: TrainingBase,
    sites: Sequence[Site],
    num_tokens: int,
    init: Init,
    text: str | None,
    choices: Sequence[str],
) -> dict[Site, Tensor]:
    """Return a matrix `[p, width]` of each site in float32 (prefix.py)."""
    if init in (Init.TEXT, Init.LABELS):
        ids = _ids_of(base, text_of(text, choices, init))
    else:
        ids = _drawn_ids(base, num_tokens)
    found = keys_and_values(base, _beginning(base, ids, num_tokens))
    matrices = {site: found[site][:num_tokens] for site in sites}
    if init is Init.ZERO:
        return {site: torch.zeros_like(matrix) for site, matrix in matrices.items()}
    if init is Init.RANDOM:
        return {site: torch.randn_like(matrix) * _typical(matrix) for site, matrix in matrices.items()}
    return matrices


def _typical(rows: Tensor) -> Tensor:
    """Return the root mean square of each column."""
    return rows.square().mean(0).sqrt()


@torch.no_grad()
def keys_and_values(base: TrainingBase, ids: Sequence[int]) -> dict[Site, Tensor]:
    """Return what each layer makes of a text, of every site, as matrices `[tokens, width]` in float32.

    An encoder-decoder reads the text on both sides; its decoder's begins with the start token.
    """
    row = torch.tensor([ids], device=base.model.device)
    seen: Seen = {}
    if base.is_encoder_decoder:
        start = row.new_full((1, 1), base.decoder_start_id or 0)
        decoder_ids = torch.cat([start, row], dim=1)
        base.model(input_ids=row, decoder_input_ids=decoder_ids, use_cache=False, seen=seen)
    else:
        cache = DynamicCache()  # without the configuration, which would drop what left a window
        base.model(input_ids=row, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for number, layer in enumerate(cache.layers):
            seen[Site.DECODER_SELF, number] = layer.keys, layer.values  # type: ignore[assignment, union-attr]
    return {
        site: joined([tuple(side[0].float() for side in seen[site, n]) for n in range(len(layers))])  # type: ignore[misc]
        for site, layers in base.geometry.layers.items()
    }


def _ids_of(base: TrainingBase, text: str) -> tuple[int, ...]:
    ids = base.encoder.tokenizer.plain_ids(text)
    if not ids:
        raise InvalidRequest("the text that the prompt starts from has no tokens", param="init_text")
    return ids


def _beginning(base: TrainingBase, ids: Sequence[int], num_tokens: int) -> list[int]:
    """Return as many ids as are needed: what every text of the base begins with, then the text, repeated."""
    before = base.encoder.tokenizer.leading_ids(PLAIN)[: num_tokens - 1]
    return [*before, *_repeated(ids, num_tokens - len(before))]


def _repeated(ids: Sequence[int], number: int) -> list[int]:
    return (list(ids) * -(-number // len(ids)))[:number]


def _drawn_ids(base: TrainingBase, number: int) -> tuple[int, ...]:
    """Draw tokens of the tokenizer; rows beyond it may never have been trained."""
    return tuple(torch.randint(min(len(base.tokenizer), base.geometry.vocab_size), (number,)).tolist())


def check_start(base: TrainingBase, start: Prompt, kind: PromptKind) -> None:
    """Raise InvalidRequest unless a prompt can be where another one of this kind starts.

    Raise PromptRejected: it was trained for another base.
    """
    if start.kind is not kind:
        raise InvalidRequest(
            f"the prompt to start from is of kind {start.kind}, and the method learns one of kind {kind}; "
            "take a version of the same kind, or another method",
            param="init",
        )
    validate_prompt(start, base.geometry)


def rows_of(start: Prompt, place: str) -> Tensor:
    """Return the rows `[p, d]` of a soft prompt, in float32. Raise InvalidRequest: it has none there."""
    if place not in start.tensors:
        raise InvalidRequest(f"the prompt to start from has no {place}", param="init")
    return tensor_of(start, place).float()


def matrices_of(start: Prompt, base: TrainingBase) -> dict[Site, Tensor]:
    """Return the matrix `[p, width]` of each site that a prefix has, in float32."""
    return {
        site: joined(
            [
                tuple(tensor_of(start, site.tensor(number, side)).float() for side in SIDES)  # type: ignore[misc]
                for number in range(len(layers))
            ]
        )
        for site, layers in base.geometry.layers.items()
        if start.length(site)
    }
