"""One random model under many works: our engine, parts of it switched off, PEFT and transformers.

B rows, T tasks, p virtual tokens each. Not the full product: each is varied around 64 rows, 8 tasks, p 20.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from app.models.backbones import AnyBackbone
from app.models.limits import Hardware, ModelCost, measure_hardware, model_cost
from app.prompt import Prompt, PromptKind
from app.sites import SIDES, Site
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from benchmarks import limits
from benchmarks.first_token import compare_first_token
from benchmarks.gpu.apart import noted
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Clock, Setup
from benchmarks.gpu.shapes import SHAPES, model_on, plain_copy
from benchmarks.gpu.switches import ALL, Switches, settings_of, switched
from benchmarks.gpu.turns import Turns, agreement, ratio, take_turns
from benchmarks.ours import Promptplex
from benchmarks.peft_sides import PeftGrouped, PeftPrompts
from benchmarks.shared_engine import SharedEngine, accelerated
from benchmarks.sides import Side
from benchmarks.transformers_sides import StaticBatch
from benchmarks.work import Shape, Work, embedding_width, prompts_of_width

CARTRIDGE = 2000  # virtual tokens
_FEW_ROUNDS = 3
_OURS = "Promptplex"


class Cell(NamedTuple):
    """B, T and p."""

    rows: int
    tasks: int
    virtual_tokens: int

    @property
    def name(self) -> str:
        """As in reports."""
        return f"B {self.rows}, T {self.tasks}, p {self.virtual_tokens}"


MAIN = Cell(64, 8, 20)
LONG = Cell(64, 8, 2000)  # where rows that share prefixes gain most from attending together
ONE = Cell(1, 1, 20)
CELLS = (
    *(MAIN, ONE, Cell(16, 8, 20), Cell(256, 8, 20)),
    *(Cell(64, 1, 20), Cell(256, 256, 20)),
    *(Cell(64, 8, 0), Cell(64, 8, 100), Cell(64, 8, 500), LONG),
)
QUICK = (MAIN, ONE, Cell(256, 256, 20), LONG)
TINY = (Cell(2, 2, 3), Cell(1, 1, 3))


def measure_throughput(shape_name: str, setup: Setup, findings: Findings, clock: Clock) -> None:
    """Note all figures of a shape, as far as time is left."""
    bench = Bench(setup, SHAPES[shape_name], clock)
    findings.note("seconds until loaded", round(clock.seconds - clock.left, 1))
    findings.note("hardware", asdict(bench.hardware))
    found: dict[str, Any] = {}
    for name, measure in bench.measurements():
        if clock.left < bench.needed:
            found[name] = {"left out": "no time is left"}
        else:
            try:
                found[name] = measure()
            except Exception as error:
                found[name] = {"error": noted(error)}
        findings.note("measured", found)
    bench.close()


class Bench:
    """One model on the device, and the engine with all parts on."""

    def __init__(self, setup: Setup, shape: Shape, clock: Clock) -> None:
        self._clock = clock
        self._is_tiny = setup.is_tiny
        self._cells = TINY if setup.is_tiny else QUICK if setup.is_quick else CELLS
        self._rounds = 1 if setup.is_tiny else 3 if setup.is_quick else 5
        self.needed = 1.0 if setup.is_tiny else 5.0
        self._work_of = partial(_work, shape, setup)
        self._works = {cell: self._work_of(cell) for cell in self._cells}
        self._prompts: dict[str, list[Tensor]] = {}  # by the work's name
        self.hardware = measure_hardware(setup.device)
        model = model_on(setup.device, shape)
        self._plain = plain_copy(model)
        self._cost = model_cost(model)
        self._width = embedding_width(model)
        self._model = model
        self._backbone: AnyBackbone = accelerated(model)
        self._main = self._engine(ALL, self._cells)
        self._sides = {cell: self._side(self._main, work) for cell, work in self._works.items()}

    def close(self) -> None:
        """End the engine."""
        self._main.close()

    def measurements(self) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
        """Return what there is to measure, the most important first."""
        first, *others = self._cells
        names = Switches._fields[:1] if self._is_tiny else Switches._fields
        comparisons = [
            ("peers", lambda: self._peers(first)),
            ("switches", lambda: self._switched(first, names)),
        ]
        if LONG in self._cells:
            about_prefixes = ("kernels", "cascade")
            comparisons.append(("switches at p 2000", lambda: self._switched(LONG, about_prefixes)))
        return [
            (first.name, lambda: self._cell(first)),
            ("first token", self._first_token),
            ("tasks", self._tasks),
            (others[0].name, lambda: self._cell(others[0])),
            *comparisons,
            *((cell.name, lambda cell=cell: self._cell(cell)) for cell in others[1:]),
            ("peers, one row", lambda: self._peers(others[0])),
        ]

    def _cell(self, cell: Cell) -> dict[str, Any]:
        return self._ours(cell, take_turns({_OURS: self._sides[cell]}, self._rounds, self._clock)[_OURS])

    def _ours(self, cell: Cell, turns: Turns) -> dict[str, Any]:
        found = turns.as_json()
        if turns.steps:
            least = decode_limit(self.hardware, self._cost, self._works[cell])
            found |= {"limit_seconds": least, "of_limit": round(least / median(turns.steps), 4)}
        return found

    def _tasks(self) -> dict[str, Any]:
        """Many tasks beside one, in neighbouring rounds."""
        many = self._cells[0]
        one = many._replace(tasks=1)
        sides: dict[str, Side] = {
            str(cell.tasks): self._sides.get(cell) or self._side(self._main, self._work_of(cell))
            for cell in (many, one)
        }
        turns = take_turns(sides, 2 * self._rounds, self._clock)
        of_one, of_many = turns["1"], turns[str(many.tasks)]
        return {"tasks": many.tasks, "ratio": ratio(of_many, of_one).as_json(4)}

    def _switched(self, cell: Cell, names: Sequence[str]) -> dict[str, Any]:
        """Each part off, one after the other, beside the engine with all parts on."""
        found: dict[str, Any] = {}
        for name in names:
            off = ALL._replace(**{name: False})
            engine = self._engine(off, (cell,))
            try:
                sides: dict[str, Side] = {
                    "on": self._sides[cell],
                    "off": self._side(engine, self._works[cell]),
                }
                turns = take_turns(sides, min(_FEW_ROUNDS, self._rounds), self._clock)
            finally:
                engine.close()
                del engine
                _free()
            found[name] = {
                "gain": ratio(turns["on"], turns["off"]).as_json(3),
                "off": self._ours(cell, turns["off"]),
                "same answers": round(agreement(turns["on"], turns["off"]), 3),
            }
        return found

    def _peers(self, cell: Cell) -> dict[str, Any]:
        work = self._works[cell]
        peft = PeftPrompts(self._plain)
        peft.add(work, self._prompts_of(work)[:2])  # those of the tasks that it takes as a sample
        sides: dict[str, Side] = {
            _OURS: self._sides[cell],
            PeftGrouped.name: PeftGrouped(peft, work),
            StaticBatch.name: StaticBatch(self._plain, work),
        }
        turns = take_turns(sides, min(_FEW_ROUNDS, self._rounds), self._clock)
        others = {name: each for name, each in turns.items() if name != _OURS}
        return {
            name: each.as_json() | {"ratio": ratio(turns[_OURS], each).as_json(2)}
            for name, each in others.items()
        }

    def _first_token(self) -> dict[str, Any]:
        """Of lone requests, on a resident cartridge and without."""
        prompt = self._cartridge(4 if self._is_tiny else CARTRIDGE)
        self._main.source.keep(prompt)
        work, pairs = self._works[self._cells[0]], 1 if self._is_tiny else 20
        return compare_first_token(self._main, work, pairs, prompt.digest, prompt.num_virtual_tokens)

    def _cartridge(self, num_tokens: int) -> Prompt:
        layers = self._backbone.geometry.layers[Site.DECODER_SELF]
        raw = {}
        for number, layer in enumerate(layers):
            for side, width in zip(SIDES, (layer.key_dim, layer.value_dim), strict=True):
                rows = torch.randn(layer.num_kv_heads, num_tokens, width, device=self._model.device)
                raw[Site.DECODER_SELF.tensor(number, side)] = _raw(rows.to(torch.bfloat16))
        return make_prompt(PromptKind.PREFIX, raw)

    def _engine(self, switches: Switches, cells: tuple[Cell, ...]) -> SharedEngine:
        works = [self._works[cell] for cell in cells]
        return SharedEngine(
            self._model, works, backbone=switched(self._backbone, switches), **settings_of(switches)
        )

    def _side(self, engine: SharedEngine, work: Work) -> Promptplex:
        return Promptplex(engine, work, self._prompts_of(work))

    def _prompts_of(self, work: Work) -> list[Tensor]:
        if work.name not in self._prompts:
            self._prompts[work.name] = prompts_of_width(self._width, work)
        return self._prompts[work.name]


def decode_limit(hardware: Hardware, cost: ModelCost, work: Work) -> float:
    """Return t* of a decode step half way through the answers, in seconds."""
    return limits.decode_step(hardware, cost, work, work.prompt_tokens + work.new_tokens / 2)


def _work(shape: Shape, setup: Setup, cell: Cell) -> Work:
    new_tokens = 3 if setup.is_tiny else 32 if setup.is_quick else 64
    return Work(
        shape=shape,
        name=cell.name,
        requests=cell.rows,
        tasks=cell.tasks,
        virtual_tokens=cell.virtual_tokens,
        prompt_tokens=5 if setup.is_tiny else 64,
        new_tokens=new_tokens,
    )


def _raw(rows: Tensor) -> RawTensor:
    data = rows.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return RawTensor("BF16", tuple(rows.shape), data)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
