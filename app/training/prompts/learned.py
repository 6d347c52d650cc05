"""The one interface of what is learned, and its canonical file."""

import numpy as np
import torch
from torch import Tensor, nn

from app.prompt import Prompt, PromptKind, TaskType
from app.sites import Embedding
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor


class LearnedPrompt(nn.Module):
    """A prompt in training. Its parameters are all that the optimizer gets; the base stays as it is."""

    num_tasks = 1  # that it holds a prompt for

    def __init__(self, task_type: TaskType, position_offset: int) -> None:
        """`position_offset` is the position of the decoder's first token after the prompt."""
        super().__init__()
        self.task_type = task_type
        self.position_offset = position_offset

    def tensors(self, task: int = 0) -> dict[str, Tensor]:
        """Return the prompt of a task, by canonical names (app/sites.py), with gradients.

        `[p, d]` of an embedding; or keys `[Hk, p, Dk]` and values `[Hk, p, Dv]` of every layer of a site.
        """
        raise NotImplementedError


def as_prompt(learned: LearnedPrompt, task: int = 0) -> Prompt:
    """Return the canonical prompt as it is now, in float32. Raise PromptRejected: it is none of any kind."""
    with torch.no_grad():
        tensors = learned.tensors(task)
    kind = PromptKind.SOFT if tensors.keys() <= {*Embedding} else PromptKind.PREFIX
    return make_prompt(
        kind,
        {name: _raw(tensor) for name, tensor in tensors.items()},
        task_type=learned.task_type,
        position_offset=learned.position_offset,
    )


def _raw(tensor: Tensor) -> RawTensor:
    rows = np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy(), dtype="<f4")
    return RawTensor("F32", tuple(rows.shape), rows.tobytes())
