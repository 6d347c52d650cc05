"""Solve an expression by a chain: each step's output is the next step's input.

    python -m examples.solve_in_steps '(3 + 4) * (5 + 6) - 8'

Run it beside `make serve`. The task `reduce` says in its manifest how its steps are chained; the server runs
them, and the answer comes apart from its steps.
"""

import os
import sys

import httpx2

SERVER = os.environ.get("PROMPTPLEX_SERVER", "http://localhost:8000")


def main() -> None:
    """Print the steps, then the answer."""
    expression = sys.argv[1] if len(sys.argv) > 1 else "3 * (4 + 5)"
    body = {"task_id": "reduce", "inputs": expression}
    answer = httpx2.post(f"{SERVER}/generate", json=body, timeout=60).raise_for_status().json()
    for step in answer["reasoning"]["steps"]:
        print(step)
    print(f"{expression} = {answer['generated_text'] or '?'} ({answer['details']['finish_reason']})")


if __name__ == "__main__":
    main()
