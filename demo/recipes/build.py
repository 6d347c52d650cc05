"""Make the demos from nothing: ``python -m demo.recipes.build``, about three hours on two quiet cores.

``python -m demo.recipes.build demo-causal`` makes one of them (about an hour). Stages for each base, each a
command of its own in a process of its own:

    demo.recipes.pretrain   the base, into ``demo/<base>``
    demo.recipes.prompts    its prompts, and the held-out inputs
    demo.recipes.publish    the prompts into a store, the way of every upload
    demo.recipes.more       of demo-causal: versions for an ensemble, and a task for any question
    demo.recipes.measure    held-out inputs through a running server, and by PEFT one at a time
    demo.recipes.programs   of demo-causal: what chains, votes, ensembles and the like gain

Work files and checkpoints stay in ``build/demo``: a build that was stopped goes on where it was. The seed
is fixed, but the bytes differ from processor to processor: floating-point sums are taken in other orders.
The last stage fails where a task misses its bar.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass

from demo.recipes.demos import DEMOS


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of the build and what to expect of it on two quiet cores."""

    module: str
    expected: str
    is_of_all: bool = True  # False: of demo-causal alone


STAGES = (
    Stage("demo.recipes.pretrain", "a minute of corpus, then 20 to 25 minutes of pretraining"),
    Stage("demo.recipes.prompts", "about a minute for each learned prompt, and ten for the chain's"),
    Stage("demo.recipes.publish", "seconds"),
    Stage("demo.recipes.more", "about a minute for each of four versions", is_of_all=False),
    Stage("demo.recipes.measure", "about three minutes for seven tasks"),
    Stage("demo.recipes.programs", "ten minutes of chains, votes and decisions", is_of_all=False),
)
# Keep freed pages instead of returning them to the system after each step: 15% more tokens per second.
# An allocator reads its settings once, when a process starts.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


def run_stage(stage: Stage, demo: str) -> None:
    """Run one stage; a failure ends the build with its exit status."""
    began = time.monotonic()
    print(f"== {stage.module} {demo}: expect {stage.expected}", flush=True)
    subprocess.run([sys.executable, "-m", stage.module, demo], check=True, env={**os.environ, **_ALLOCATOR})
    print(f"== {stage.module} {demo}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only-prompts", action="store_true", help="keep the base, train the prompts again")
    parser.add_argument("demos", nargs="*", metavar="demo", help=f"default: {' '.join(DEMOS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.demos) - DEMOS.keys():
        parser.error(f"no demo is called {', '.join(sorted(unknown))}; there are {', '.join(DEMOS)}")
    began = time.monotonic()
    try:
        for demo in arguments.demos or DEMOS:
            for stage in STAGES[arguments.only_prompts :]:
                if stage.is_of_all or demo == "demo-causal":
                    run_stage(stage, demo)
    except subprocess.CalledProcessError as failure:
        sys.exit(f"the build stopped: {' '.join(failure.cmd[1:])} ended with status {failure.returncode}")
    print(f"{time.monotonic() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
