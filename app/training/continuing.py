"""What the base writes after a text that it reads once: many continuations, one set of keys and values.

B rows are written together; V is the vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor
from transformers import DynamicCache

from app.training.base import TrainingBase

Choose = Callable[[Tensor], Tensor]  # from logits [B, V] to the next ids [B]


def greedy(logits: Tensor) -> Tensor:
    """Choose the most probable token of each row."""
    return logits.argmax(-1)


def sampling(temperature: float, seed: int) -> Choose:
    """Return what draws from the whole distribution, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        shares = (logits.float().cpu() / temperature).softmax(-1)
        return torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)

    return choose


class Context:
    """A text that the base has read."""

    def __init__(self, base: TrainingBase, ids: Sequence[int]) -> None:
        self._base = base
        self._ids = ids
        self._cache = DynamicCache(config=base.model.config)
        with torch.no_grad():
            base.model(
                input_ids=self._row(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )

    def continued(
        self,
        sources: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        is_done: Callable[[list[int]], bool] = lambda _: False,
        choose: Choose = greedy,
    ) -> list[list[int]]:
        """Return what follows each source, up to and with EOS, or until `is_done` says so of a row's new ids.

        Sources of one length run together, so that there is no padding: between the context and a token it
        would count as something in a window of attention.
        """
        of_length = defaultdict(list)
        for index, source in enumerate(sources):
            of_length[len(source)].append(index)
        written: dict[int, list[int]] = {}
        for indices in of_length.values():
            rows = _Rows(self._base, deepcopy(self._cache), [sources[index] for index in indices])
            written |= zip(indices, rows.continued(max_new_tokens, is_done, choose), strict=True)
        return [written[index] for index in range(len(sources))]

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self._base.model.device)


class _Rows:
    """Sources of one length that are continued together."""

    def __init__(self, base: TrainingBase, cache: DynamicCache, sources: Sequence[Sequence[int]]) -> None:
        cache.batch_repeat_interleave(len(sources))
        self._model, self._cache, self._ends = base.model, cache, base.eos_ids
        self._ids = torch.tensor(sources, device=base.model.device)  # that were not run yet

    def continued(
        self, max_new_tokens: int, is_done: Callable[[list[int]], bool], choose: Choose
    ) -> list[list[int]]:
        """Return each row's new ids."""
        written: list[list[int]] = [[] for _ in self._ids]
        running = set(range(len(written)))
        for _ in range(max_new_tokens):
            chosen = choose(self._logits())
            for row in sorted(running):
                written[row].append(int(chosen[row]))
                if written[row][-1] in self._ends or is_done(written[row]):
                    running.remove(row)
            if not running:
                break
            self._ids = chosen[:, None]
        return written

    @torch.no_grad()
    def _logits(self) -> Tensor:
        """Return logits `[B, V]` of the next token."""
        out = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits
