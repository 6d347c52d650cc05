"""Assemble the engine in a script, without HTTP, and print an answer of a demo task.

    python -m examples.engine_without_http

Run it in a checkout. The settings are those of `promptplex serve`: set `PROMPTPLEX_MODEL` for another base.
"""

import asyncio

from app.main import assemble
from app.serving.generation_request import GenerationRequest
from app.settings import load_settings


def main() -> None:
    """Load the base, answer one request of the task `date-iso`, and close."""
    services = assemble(load_settings({}))
    try:
        request = GenerationRequest(task="date-iso", inputs="the 22nd of November 1963")
        print(asyncio.run(services.generation.generate(request)).text)
    finally:
        services.close()


if __name__ == "__main__":
    main()
