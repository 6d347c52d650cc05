"""All parts of benchmarks.gpu, tiny, in a Python that has torch, transformers, Triton and PEFT alone.

What else is installed here is hidden, but for what those four need themselves.
"""

import importlib.metadata
import itertools
import json
import os
import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, ClassVar

_THERE = ("torch", "transformers", "triton", "peft")


def needed(names: tuple[str, ...]) -> set[str]:
    """The distributions of these names, and all that they require."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = _normal(todo.pop())
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.split(r"[^\w.-]", each)[0] for each in requirements if "extra ==" not in each]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Hiding(PathFinder):
    """A finder that doesn't see some packages."""

    hidden: ClassVar[set[str]] = set()

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        hides = fullname.partition(".")[0] in cls.hidden
        return None if hides else super().find_spec(fullname, path, target)


def hide_others() -> set[str]:
    there = needed(_THERE)
    packages = importlib.metadata.packages_distributions()
    hidden = {each for each, of in packages.items() if not there & {_normal(name) for name in of}}
    Hiding.hidden = hidden - {"app", "benchmarks"}
    sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
    return Hiding.hidden


def main() -> None:
    hidden = hide_others()
    os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.gpu import goals, table, throughput
    from benchmarks.gpu.apart import run_here
    from benchmarks.gpu.parts import PARTS, parts_of
    from benchmarks.gpu.setup import Clock, Setup
    from benchmarks.limits import Hardware

    throughput.measure_hardware = lambda device: Hardware(1e10, 1e11)  # type: ignore[attr-defined]
    setup = Setup(device="cpu", is_tiny=True, is_quick=True)
    report: dict[str, Any] = {"parts": {}}
    parts = [name for name in PARTS if name not in ("facts", "times")]
    for part in itertools.chain(*parts_of(parts, ["tiny"], setup)):
        report["parts"][part.name] = run_here(part.run, setup, Clock(300), Path(sys.argv[1]) / part.name)
    report["goals"] = goals.goals_json(report)
    loaded = {name.partition(".")[0] for name in sys.modules}
    found = {"report": report, "table": table.table(report), "loaded": sorted(loaded & hidden)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
