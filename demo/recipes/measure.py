"""Measure a demo as its users see it, and compare it with PEFT, output by output.

    python -m demo.recipes.measure demo-causal

Starts `promptplex serve` in float32 and runs `promptplex eval` on each task's held-out file: with the task,
and without one (the base model gets the same rendered text, without a learned prompt). Then PEFT answers the
same inputs at batch size 1 (for a three-site prefix it is ``three_sites``), and every output must be the
same. Fails where a task misses its bar.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from demo.recipes import heldout
from demo.recipes.demos import DEMOS, Demo
from demo.recipes.oracle import answers, load_task
from demo.recipes.tasks import TEMPLATE, Task, TextTask

WITHOUT_BELOW = 0.30
_PROMPTPLEX = [sys.executable, "-m", "app.cli"]

Report = dict[str, Any]


@contextlib.contextmanager
def running_server(base: Path, store: Path, log: Path) -> Iterator[str]:
    """The URL of a server in float32, where the served numbers are PEFT's own; it ends with the block."""
    command = [*_PROMPTPLEX, "serve", "--model", str(base), "--store", str(store), "--port", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, "--dtype", "float32"], stderr=stderr)
    try:
        while "ready: " not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(f"the server ended before it was ready:\n{log.read_text()}")
            time.sleep(0.2)
        yield log.read_text().split("running on ")[1].split()[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def evaluate(url: str, task: Task, data: Path, out: Path, *, with_task: bool) -> Report:
    """`promptplex eval` of one file."""
    bound = ["--max-new-tokens", str(task.max_new_tokens)]
    asked = ["--task", task.name] if with_task else ["--template", TEMPLATE]
    command = [*_PROMPTPLEX, "eval", *asked, *bound, "--data", str(data), "--out", str(out), "--server", url]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report: Report = json.loads(out.read_text())
    return report


def write_inputs(task: Task, work: Path) -> dict[str, Path]:
    """All held-out inputs of a task, as files: more than what is kept of some tasks in ``demo/heldout``."""
    data = {"all": work / f"{task.name}.jsonl"}
    data["all"].write_text(heldout.encode(task, heldout.examples(task)))
    by_hand = heldout.HELDOUT / f"{task.name}.handwritten.jsonl"
    return data | ({"handwritten": by_hand} if by_hand.exists() else {})


def measure_task(url: str, task: Task, work: Path) -> dict[str, Report]:
    """Reports of a task: with it, without it, and on the hand-written inputs where there are any."""
    data = write_inputs(task, work)
    asked = {"with task": (data["all"], True), "without": (data["all"], False)}
    if "handwritten" in data:
        asked["handwritten"] = (data["handwritten"], True)
    return {
        label: evaluate(url, task, file, work / f"{task.name}.{label.replace(' ', '-')}.json", with_task=flag)
        for label, (file, flag) in asked.items()
    }


def compare_with_peft(task: Task, report: Report, demo: Demo) -> list[str]:
    """Where PEFT at batch 1 says something else: one line each."""
    model, tokenizer = load_task(task, demo.path, demo.prompts)
    served = report["outputs"]
    bar = tqdm([line["inputs"] for line in served], f"PEFT {task.name}", mininterval=2)
    own = answers(task, model, tokenizer, bar)
    return [
        f"{task.name}: {line['inputs']!r}: PEFT {text!r}, served {line['generated']!r}"
        for line, text in zip(served, own, strict=True)
        if line["generated"] != text
    ]


def misses(task: Task, reports: dict[str, Report]) -> list[str]:
    """The bars that a task misses."""
    shares = {label: report["scores"][task.bar]["share"] for label, report in reports.items()}
    found = []
    if shares["with task"] < task.at_least:
        found.append(f"{task.name}: {task.bar} {shares['with task']:.1%}, needed {task.at_least:.0%}")
    if shares["without"] >= WITHOUT_BELOW:
        found.append(
            f"{task.name} without its task: {shares['without']:.1%}, must be below {WITHOUT_BELOW:.0%}"
        )
    return found


def summary(task: Task, reports: dict[str, Report], num_different: int) -> dict[str, Any]:
    """What `results.json` keeps of a task: scores, not outputs."""
    return {
        "kind": "text only" if isinstance(task, TextTask) else task.kind,
        "bar": task.bar,
        **{label: report["scores"] for label, report in reports.items()},
        "outputs_that_differ_from_peft": num_different,
    }


def show(name: str, reports: dict[str, Report]) -> str:
    """One line of a task."""
    cells = []
    for label, report in reports.items():
        exact = report["scores"]["exact"]
        slots = report["scores"].get("every_slot")
        covered = "" if slots is None else f", every slot {slots['count']}"
        low, high = exact["interval_95"]
        cells.append(f"{label} {exact['count']}/{exact['total']} [{low:.1%}, {high:.1%}]{covered}")
    return f"{name:14} " + "; ".join(cells)


def table_row(name: str, result: dict[str, Any]) -> str:
    """A task's line in the documents' tables, from its entry in `results.json`."""
    bar = result["bar"]
    score, without = (result[label][bar] for label in ("with task", "without"))
    low, high = score["interval_95"]
    share = f"{score['count']} of {score['total']}: {score['share']:.1%} [{low:.1%}, {high:.1%}]"
    return f"| {name} | {result['kind']} | {bar.replace('_', ' ')} | {share} | {without['share']:.1%} |"


def measure(demo: Demo, tasks: Sequence[Task]) -> tuple[dict[str, Any], list[str]]:
    """What ``results.json`` keeps of these tasks, and what is wrong with them: one line each."""
    work = demo.work / "eval"
    work.mkdir(parents=True, exist_ok=True)
    reports: dict[str, dict[str, Report]] = {}
    with running_server(demo.path, demo.store, work / "server.log") as url:
        for task in tasks:
            reports[task.name] = measure_task(url, task, work)
            print(show(task.name, reports[task.name]), flush=True)
    failures, results = [], {}
    for task in tasks:
        different = compare_with_peft(task, reports[task.name]["with task"], demo)
        failures += [*different, *misses(task, reports[task.name])]
        results[task.name] = summary(task, reports[task.name], len(different))
    return results, failures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("tasks", nargs="*", help="default: all of them")
    arguments = parser.parse_args()
    demo = DEMOS[arguments.demo]
    tasks = [task for task in demo.tasks if not arguments.tasks or task.name in arguments.tasks]
    results, failures = measure(demo, tasks)
    target = demo.path / "results.json"
    kept = json.loads(target.read_text()) if arguments.tasks else {}
    found = kept | results
    ordered = {task.name: found[task.name] for task in demo.tasks if task.name in found}
    target.write_text(json.dumps(ordered, indent=2) + "\n")
    print("\n".join(table_row(name, result) for name, result in results.items()))
    if failures:
        sys.exit("\n".join(failures))
    print("every output equals PEFT's at batch 1, and every task passes its bar")


if __name__ == "__main__":
    main()
