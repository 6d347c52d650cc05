"""Soft prompts: rows of embeddings before the input. p virtual tokens, d embedding width, h of a network."""

from typing import Literal

import torch
from torch import Tensor, nn

from app.prompt import TaskType
from app.sites import Embedding
from app.training.prompts.learned import LearnedPrompt


class _RowsBeforeInput(LearnedPrompt):
    """Rows at the embeddings of what reads the input: the encoder, where there is one."""

    def __init__(self, task_type: TaskType, num_rows: int) -> None:
        has_encoder = task_type is TaskType.SEQ_2_SEQ_LM
        super().__init__(task_type, position_offset=0 if has_encoder else num_rows)
        self.place = Embedding.ENCODER if has_encoder else Embedding.DECODER


class SoftPrompt(_RowsBeforeInput):
    """The rows themselves (prompt tuning)."""

    def __init__(self, task_type: TaskType, rows: Tensor) -> None:
        """`rows [p, d]` are where it starts."""
        super().__init__(task_type, len(rows))
        self.rows = nn.Parameter(rows.clone())

    def tensors(self, task: int = 0) -> dict[str, Tensor]:
        return {self.place: self.rows}


class WrittenSoftPrompt(_RowsBeforeInput):
    """Rows that a small network writes from rows of its own; the file has what it wrote (p-tuning)."""

    def __init__(
        self, task_type: TaskType, rows: Tensor, network: Literal["mlp", "lstm"], hidden_size: int
    ) -> None:
        """`rows [p, d]` are what the network reads at the start."""
        super().__init__(task_type, len(rows))
        width = rows.shape[1]
        self.rows = nn.Parameter(rows.clone())
        if network == "mlp":
            self.network: nn.Module = nn.Sequential(
                nn.Linear(width, hidden_size),
                nn.ReLU(),
                nn.Linear(hidden_size, hidden_size),
                nn.ReLU(),
                nn.Linear(hidden_size, width),
            )
        else:
            self.network = _Lstm(width, hidden_size)

    def tensors(self, task: int = 0) -> dict[str, Tensor]:
        return {self.place: self.network(self.rows)}


class _Lstm(nn.Module):
    """Two layers in both directions, and two linear ones."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden_size, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(2 * hidden_size, 2 * hidden_size), nn.ReLU(), nn.Linear(2 * hidden_size, width)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Return `[p, d]`."""
        written: Tensor = self.head(self.lstm(rows[None])[0][0])
        return written


class MultitaskPrompt(_RowsBeforeInput):
    """Rows that all tasks share, times a matrix of rank one of each task (multitask prompt tuning).

    A task's prompt is `shared * (column @ row)`, an ordinary soft prompt. Matrices start near one, so that
    every task starts from the shared rows; PEFT's start near zero, from where text as a start is lost.
    """

    _SPREAD = 0.02  # of a matrix's factors, around one

    def __init__(self, task_type: TaskType, rows: Tensor, num_tasks: int) -> None:
        """`rows [p, d]` are the shared ones at the start."""
        super().__init__(task_type, len(rows))
        self.num_tasks = num_tasks
        self.shared = nn.Parameter(rows.clone())
        self.columns = nn.Parameter(1 + self._SPREAD * torch.randn(num_tasks, len(rows), 1))
        self.rows = nn.Parameter(1 + self._SPREAD * torch.randn(num_tasks, 1, rows.shape[1]))

    def tensors(self, task: int = 0) -> dict[str, Tensor]:
        return {self.place: self.shared * (self.columns[task] @ self.rows[task])}
