"""Pairs to training batches: padded, with few pads, and every step holds the whole mixture."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from demo.recipes.pairs import Pair
from demo.recipes.rows import OUTPUT_WEIGHT, PLAIN_WEIGHT

IGNORED = -100
EOS_ID, PAD_ID = 0, 1
SHORT_ANSWER = 8  # tokens: a shorter answer weighs as much as one of these, else a label hardly counts
_PARTS = 3  # micro-batches of a step: sorted by length, so that short sources are not padded to the longest


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one pair, and the loss weight of its target.

    The decoder reads ``leading``, the start token (pad) and the target; it is scored on the target and eos.
    """

    source: list[int]  # with eos
    leading: list[int]
    target: list[int]  # with eos
    weight: float

    @property
    def decoder_input(self) -> list[int]:
        return [*self.leading, PAD_ID, *self.target[:-1]]

    @property
    def labels(self) -> list[int]:
        return [*[IGNORED] * len(self.leading), *self.target]


def encode(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast) -> Iterator[Encoded]:
    """Tokenize; the tokenizer puts eos after a source by itself."""
    backend = tokenizer.backend_tokenizer
    sources = backend.encode_batch([pair.source for pair in pairs])
    leading = backend.encode_batch([pair.leading for pair in pairs], add_special_tokens=False)
    targets = backend.encode_batch([pair.target for pair in pairs], add_special_tokens=False)
    for pair, source, lead, target in zip(pairs, sources, leading, targets, strict=True):
        written = [*target.ids, EOS_ID]
        weight = PLAIN_WEIGHT if pair.plain else OUTPUT_WEIGHT * max(1.0, SHORT_ANSWER / len(written))
        yield Encoded(source.ids, lead.ids, written, weight)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokenized pairs, one after the other: hundreds of thousands of small lists would slow the allocator."""

    ids: torch.Tensor  # [tokens] int16
    ends: torch.Tensor  # [pairs, 3] int64: where source, leading and target of a pair end
    weights: torch.Tensor  # [pairs] float32

    @classmethod
    def of(cls, encoded: Iterable[Encoded]) -> Corpus:
        ids, ends, weights = array("h"), array("q"), array("f")
        for pair in encoded:
            for part in (pair.source, pair.leading, pair.target):
                ids.extend(part)
                ends.append(len(ids))
            weights.append(pair.weight)
        return cls(torch.tensor(ids), torch.tensor(ends).view(-1, 3), torch.tensor(weights))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Encoded:
        start = int(self.ends[index - 1, 2]) if index else 0
        first, second, last = self.ends[index].tolist()
        ids = self.ids[start:last].tolist()
        source, leading = ids[: first - start], ids[first - start : second - start]
        return Encoded(source, leading, ids[second - start :], float(self.weights[index]))


def padded(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """Rows of ids as ``[rows, longest]``, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def collate(chosen: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Right-padded ``[rows, longest]`` tensors that an encoder-decoder takes; labels -100 are not scored."""
    source = padded([pair.source for pair in chosen], PAD_ID)
    lengths = torch.tensor([len(pair.source) for pair in chosen])
    return {
        "input_ids": source,
        "attention_mask": (torch.arange(source.shape[1]) < lengths[:, None]).long(),
        "decoder_input_ids": padded([pair.decoder_input for pair in chosen], PAD_ID),
        "labels": padded([pair.labels for pair in chosen], IGNORED),
    }


def losses(model: PreTrainedModel, chosen: Sequence[Encoded]) -> Iterator[torch.Tensor]:
    """The step's loss in parts: their sum is the weighted mean over the targets of ``chosen``."""
    total = sum(pair.weight * len(pair.target) for pair in chosen)
    ordered = sorted(chosen, key=lambda pair: (len(pair.source), len(pair.target)))
    size = -(-len(ordered) // _PARTS)
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        batch = collate(part)
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch, use_cache=False).logits
        weights = torch.tensor([pair.weight for pair in part])[:, None].expand_as(labels)
        each = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        yield (each * weights.flatten()).sum() / total
