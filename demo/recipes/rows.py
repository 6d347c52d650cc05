"""Documents to training rows: packed whole into rows of fixed length, with a loss weight per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from demo.recipes.corpus import Document

ROW_LENGTH = 128
OUTPUT_WEIGHT, PLAIN_WEIGHT, CONTEXT_WEIGHT = 1.0, 0.4, 0.2
_OPEN_ROWS = 12  # documents go to the fullest of these rows that still has room


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed documents."""

    ids: torch.Tensor  # [rows, ROW_LENGTH] int16
    weights: (
        torch.Tensor
    )  # [rows, ROW_LENGTH] float16: the loss weight of predicting this token; 0 is padding

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterable[tuple[list[int], list[float]]]:
    """Ids and weights of each document and its ``<eos>``; context and output are tokenized apart."""
    backend = tokenizer.backend_tokenizer
    contexts = backend.encode_batch([document.context for document in documents])
    outputs = backend.encode_batch([document.output for document in documents])
    for document, context, output in zip(documents, contexts, outputs, strict=True):
        weight = PLAIN_WEIGHT if document.plain else OUTPUT_WEIGHT
        ids = [*context.ids, *output.ids, 0]
        yield ids, [CONTEXT_WEIGHT] * len(context.ids) + [weight] * (len(output.ids) + 1)


def pack(encoded: Iterable[tuple[list[int], list[float]]], pad_id: int) -> Rows:
    """Pack whole documents; one longer than a row is left out."""
    finished: list[tuple[list[int], list[float]]] = []
    open_rows: list[tuple[list[int], list[float]]] = []
    for ids, weights in encoded:
        if len(ids) > ROW_LENGTH:
            continue
        fitting = [row for row in open_rows if len(row[0]) + len(ids) <= ROW_LENGTH]
        if fitting:
            row = max(fitting, key=lambda candidate: len(candidate[0]))
            row[0].extend(ids)
            row[1].extend(weights)
            continue
        open_rows.append((list(ids), list(weights)))
        if len(open_rows) > _OPEN_ROWS:
            fullest = max(range(len(open_rows)), key=lambda index: len(open_rows[index][0]))
            finished.append(open_rows.pop(fullest))
    return _stack([*finished, *open_rows], pad_id)


def _stack(rows: list[tuple[list[int], list[float]]], pad_id: int) -> Rows:
    ids = torch.full((len(rows), ROW_LENGTH), pad_id, dtype=torch.int16)
    weights = torch.zeros((len(rows), ROW_LENGTH), dtype=torch.float16)
    for index, (row_ids, row_weights) in enumerate(rows):
        ids[index, : len(row_ids)] = torch.tensor(row_ids, dtype=torch.int16)
        weights[index, : len(row_weights)] = torch.tensor(row_weights, dtype=torch.float16)
    return Rows(ids, weights)
