"""The README's tables, one for each kind of processor: ``python -m benchmarks.tables REPORT.json ...``."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS = "Promptplex"
_COLUMNS = {
    "vLLM CPU, compiled, prompt_embeds": "vLLM",
    "OpenVINO GenAI, no prompts": "OpenVINO, no prompts",
    "OpenVINO, no prompts": "OpenVINO, no prompts",
}
_KINDS = {"cpu-amx": "AMX", "cpu-avx512-bf16": "AVX-512 bf16, no AMX", "cpu-avx512": "AVX-512, no bf16"}
_HEAD = ("work", "a second", *dict.fromkeys(_COLUMNS.values()), "others", "of t*: step, whole")


def tables(report: Mapping[str, Any]) -> str:
    """A line that names the machine, and a row for each work: our rate, and how many times as fast we are.

    Ratios are medians over the rounds with their quartiles.
    """
    machine = report["machine"]
    kind = _KINDS.get(report["kind"], report["kind"].removeprefix("cpu-"))
    what = [machine["processor"], f"{machine['cores']} cores", kind, *report.get("notes", [])]
    lines = [f"{', '.join(what)}:", "", f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
    lines += [f"| {' | '.join(_cells(name, work))} |" for name, work in report["works"].items()]
    return "\n".join(lines)


def _cells(name: str, work: Mapping[str, Any]) -> list[str]:
    rate = work["sides"][_OURS]["per_second"]["median"]
    found: dict[str, list[str]] = {column: [] for column in _COLUMNS.values()}
    others = []
    for side, figures in work["ratios"].items():
        if side in _COLUMNS:
            found[_COLUMNS[side]].append(_ratio(figures))
        else:
            others.append(f"{side.removesuffix(', no prompts')} {_ratio(figures)}")
    others += [f"our {other} {_ratio(figures)}" for other, figures in work["beside"].items()]
    return [
        f"`{name}`: {work['description']}",
        f"{rate:.1f}" if work["unit"] == "tokens/s" else f"{rate:.1f} answers",
        *(", ".join(cells) or "-" for cells in found.values()),
        "; ".join(others) or "-",
        _limits(work["limits"]),
    ]


def _ratio(figures: Mapping[str, Any]) -> str:
    low, high = figures["quartiles"]
    return f"{figures['median']:.2f} [{low:.2f}, {high:.2f}]"


def _limits(limits: Mapping[str, float]) -> str:
    if not limits:
        return "-"
    step = limits.get("decode_step_fraction")
    return f"{'-' if step is None else f'{step:.0%}'}, {limits['whole_work_fraction']:.0%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of reports."""
    for path in sys.argv[1:] if arguments is None else arguments:
        print(f"{tables(json.loads(Path(path).read_text()))}\n")


if __name__ == "__main__":
    main()
