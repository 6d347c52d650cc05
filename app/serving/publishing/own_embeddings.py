"""An adapter's file may hold embeddings of the base too: they must be the base's own, row by row."""

from app.engine.client import EngineClient
from app.errors import PromptRejected
from app.models.backbone import Backbone
from app.models.own_tensors import digest_of_rows
from app.store.saved_tensors import ADVICE, SavedTensor
from app.strict_json import excerpt


class OwnEmbeddings:
    """Compares the tensors beside the prompt of one file; those that pass are dropped."""

    def __init__(self, base: EngineClient | Backbone) -> None:
        self._base = base
        self.warnings: list[str] = []

    def check(self, saved: SavedTensor) -> None:
        """Raise PromptRejected unless its rows, as far as the base has them, are the base's.

        Tokens that were added in training have rows that the base lacks; no text is tokenized to them here.
        """
        own = self._base.own_tensor(saved.name)
        shown = excerpt(saved.name)
        if own is None:
            raise PromptRejected(
                "The file holds a tensor that is neither the prompt nor an embedding of the base model",
                tensor=shown,
                expected="prompt_embeddings alone",
            )
        if saved.shape[1:] != tuple(own.shape[1:]):
            expected = f"[tokens{''.join(f', {size}' for size in own.shape[1:])}], as the base model has it"
            raise PromptRejected(
                f"The adapter was trained on another base: {ADVICE} if it wasn't",
                tensor=shown,
                expected=expected,
                found=str(list(saved.shape)),
            )
        rows, dtype = min(saved.shape[0], own.shape[0]), saved.compared_in(self._base.geometry.dtype)
        if saved.digest(rows, dtype) != digest_of_rows(own, rows, dtype):
            raise PromptRejected(
                "The adapter brings embeddings that are not the base model's, which can't be served: all "
                f"tasks share the base's. If they weren't trained, {ADVICE}",
                tensor=shown,
                expected=f"the base model's own {rows} rows",
                found="other numbers",
            )
        if saved.shape[0] > own.shape[0]:
            self.warnings.append(
                f"{shown} has {saved.shape[0] - own.shape[0]} rows more than the base model, for tokens "
                "that were added in training: they are left out, and here such tokens are plain text"
            )
