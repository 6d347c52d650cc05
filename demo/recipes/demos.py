"""The demos, as data: a base, its tasks, and where they and their figures are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.recipes.seq2seq_tasks import BART_TASKS, T5_TASKS
from demo.recipes.tasks import BART_NAME, BASE_NAME, T5_NAME, TASKS, Task

_WORK = Path("build/demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """One base with its tasks. ``store`` is where they are published."""

    path: Path  # of the base
    tasks: tuple[Task, ...]
    prompts: Path
    store: Path

    @property
    def work(self) -> Path:
        """Checkpoints and reports of a build."""
        return _WORK / self.path.name


_ALL = (
    Demo(path=Path(BASE_NAME), tasks=TASKS, prompts=Path("demo/prompts"), store=Path("prompts_store")),
    Demo(
        path=Path(T5_NAME),
        tasks=T5_TASKS,
        prompts=Path("demo/seq2seq-prompts"),
        store=_WORK / "seq2seq/store",
    ),
    Demo(
        path=Path(BART_NAME),
        tasks=BART_TASKS,
        prompts=Path("demo/seq2seq-bart-prompts"),
        store=_WORK / "seq2seq-bart/store",
    ),
)
DEMOS = {demo.path.name: demo for demo in _ALL}
