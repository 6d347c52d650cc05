"""The frozen base under a prompt in training: logits before each token of the answers, teacher-forced.

The prompt is put where serving puts it. Batches are padded on the right, and the head runs at the rows that
have labels, nowhere else. B examples of n tokens, p virtual tokens, d embedding width, V vocabulary, R rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from app.sites import SIDES, Embedding, Site
from app.training.base import TrainingBase
from app.training.examples import EncodedExample
from app.training.prompts.learned import LearnedPrompt
from app.training.prompts.starts import embed_after_prompt

Examples = Sequence[EncodedExample]
Tensors = dict[str, Tensor]  # of the prompts of T tasks `[T, ...]`, by canonical names
Inputs = dict[str, Any]  # of the model's forward pass


class PromptedModel:
    """Computes losses. Gradients reach the prompt alone."""

    def __init__(self, base: TrainingBase, learned: LearnedPrompt) -> None:
        self._base = base
        self._model = base.model
        self._learned = learned

    def loss(self, examples: Examples) -> tuple[Tensor, int]:
        """Return the sum of the target tokens' negative log-probabilities, and how many they are."""
        targets = torch.tensor([id_ for each in examples for id_ in each.target], device=self._model.device)
        return functional.cross_entropy(self.logits(examples), targets, reduction="sum"), len(targets)

    def logits(self, examples: Examples) -> Tensor:
        """Return logits `[R, V]` (float32 at least) before each target token, in the examples' order."""
        assert all(each.source and each.target for each in examples), "nothing to read, or nothing to write"
        tasks = sorted({each.task for each in examples})
        prompts = [self._learned.tensors(task) for task in tasks]
        prompt = {name: torch.stack([each[name] for each in prompts]) for name in prompts[0]}
        of_examples = torch.tensor([tasks.index(each.task) for each in examples], device=self._model.device)
        inputs_of = self._encoder_decoder_inputs if self._base.is_encoder_decoder else self._causal_inputs
        inputs, firsts = inputs_of(examples, prompt, of_examples)
        with _head_at(self._model, firsts, [len(each.target) for each in examples]):
            logits: Tensor = self._model(**inputs).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _causal_inputs(
        self, examples: Examples, prompt: Tensors, of_examples: Tensor
    ) -> tuple[Inputs, list[int]]:
        """Return also the row of each example's first label, which is that of its source's last token.

        What stands on the right of a token is hidden from it, so padding needs no mask.
        """
        ids = self._padded([[*each.source, *each.target[:-1]] for each in examples])
        lasts = [len(each.source) - 1 for each in examples]
        offset = self._learned.position_offset
        positions = torch.arange(offset + ids.shape[1], device=ids.device).expand(len(ids), -1)
        rows = prompt.get(Embedding.DECODER)
        if rows is not None and not self._base.geometry.takes_prefixes:
            embeds = self._behind(rows[of_examples], ids)
            inputs: Inputs = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False}
            return inputs, [offset + last for last in lasts]
        cache = DynamicCache(config=self._model.config)
        cache = self._filled(cache, prompt) if rows is None else self._read(cache, rows)
        cache.batch_select_indices(of_examples)
        inputs = {"input_ids": ids, "position_ids": positions[:, offset:], "past_key_values": cache}
        return inputs | {"use_cache": True}, lasts

    def _read(self, cache: DynamicCache, rows: Tensor) -> DynamicCache:
        """Put the keys and values of soft prompts `[T, p, d]` into a cache, once for all examples of a task.

        Nothing of an example is in them, since a causal base reads the prompt first. Serving does the same.
        """
        embeds = rows.to(self._model.dtype)
        positions = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
        self._model.base_model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return cache

    def _encoder_decoder_inputs(
        self, examples: Examples, prompt: Tensors, of_examples: Tensor
    ) -> tuple[Inputs, list[int]]:
        """Return also the row of each example's first label, which is the decoder's first.

        Keys and values that the decoder's positions count are in its cache; attention gets all others.
        """
        assert self._base.decoder_start_id is not None
        decoder_ids = [[self._base.decoder_start_id, *each.target[:-1]] for each in examples]
        inputs: Inputs = {"decoder_input_ids": self._padded(decoder_ids), "use_cache": False}
        rows = prompt.get(Embedding.ENCODER)
        inputs |= self._source_inputs(examples, None if rows is None else rows[of_examples])
        sites = {site for site in Site if site.tensor(0, "k") in prompt}
        if self._learned.position_offset:
            sites.discard(Site.DECODER_SELF)
            own = self._filled(DynamicCache(), prompt)
            own.batch_select_indices(of_examples)
            cache = EncoderDecoderCache(own, DynamicCache())
            inputs |= {"past_key_values": cache, "use_cache": True}
        inputs["prefixes"] = {site: self._pairs(prompt, site) for site in sites}
        return inputs, [0] * len(examples)

    def _source_inputs(self, examples: Examples, rows: Tensor | None) -> Inputs:
        """Padding of sources is masked: an encoder sees both sides."""
        ids = self._padded([each.source for each in examples])
        lengths = torch.tensor([len(each.source) for each in examples], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        if rows is None:
            return {"input_ids": ids, "attention_mask": mask.long()}
        mask = functional.pad(mask, (rows.shape[1], 0), value=True)
        return {"inputs_embeds": self._behind(rows, ids), "attention_mask": mask.long()}

    def _behind(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return `[B, p + n, d]`: a soft prompt, then the embeddings of ids."""
        embeds = embed_after_prompt(self._base, ids)
        return torch.cat([rows.to(embeds.dtype), embeds], dim=1)

    def _filled(self, cache: DynamicCache, prompt: Tensors) -> DynamicCache:
        """Put the decoder's prefix into a cache, as PEFT does."""
        for layer, (keys, values) in enumerate(self._pairs(prompt, Site.DECODER_SELF)):
            cache.update(keys, values, layer)
        return cache

    def _pairs(self, prompt: Tensors, site: Site) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values of each layer of a site, in the dtype of the pass."""
        dtype = _dtype_of_pass(self._model)
        keys, values = (
            [
                prompt[site.tensor(layer, side)].to(dtype)
                for layer in range(len(self._base.geometry.layers[site]))
            ]
            for side in SIDES
        )
        return list(zip(keys, values, strict=True))

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return `[B, longest]`. Any id may fill it up, since nothing reads it."""
        longest = max(map(len, rows))
        filled = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, device=self._model.device)


def _dtype_of_pass(model: PreTrainedModel) -> torch.dtype:
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


@contextmanager
def _head_at(model: PreTrainedModel, firsts: Sequence[int], counts: Sequence[int]) -> Iterator[None]:
    """Let the head see only so many rows of each example, from the first on: `[R, d]` of `[B, n, d]`."""
    device = model.device
    examples = torch.arange(len(firsts)).repeat_interleave(torch.tensor(counts)).to(device)
    columns = torch.cat(
        [torch.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    ).to(device)

    def select(head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (args[0][examples, columns],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
