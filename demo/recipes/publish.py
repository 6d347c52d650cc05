"""Publish a demo's prompts: the way of every upload, on the base that they were trained on.

    python -m demo.recipes.publish demo-causal

Each directory of its prompts becomes a version in its store and goes live, after
it was validated, tried out, and answered the examples of its ``task.json`` as expected. What is
published already stays as it is.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from pathlib import Path

from app.main import assemble
from app.serving.publishing.bundle import read_bundle
from app.serving.publishing.publisher import PublishingService, UploadResult
from app.settings import Settings
from demo.recipes.demos import DEMOS


async def publish(publishing: PublishingService, directory: Path) -> UploadResult:
    """Upload one directory. ValueError where the served model misses one of its own examples."""
    upload = replace(read_bundle(directory), who="make demo")
    result = await publishing.upload(directory.name, upload)
    for example in result.examples:
        if not example.matches:
            raise ValueError(
                f"{directory.name}: {example.inputs!r} gave {example.generated!r}, "
                f"expected {example.expected!r}"
            )
    return result


def publish_all(base: Path, prompts: Path, store: Path) -> None:
    """Publish every prompt directory, in float32, where the served numbers are PEFT's own."""
    settings = Settings(model=str(base), store=store, dtype="float32", device="cpu")
    services = assemble(settings, progress=print, on_failure=lambda _: None)
    try:
        for directory in sorted(prompts.iterdir()):
            result = asyncio.run(publish(services.publishing, directory))
            state = "published" if result.created else "unchanged"
            print(f"{directory.name}: version {result.version.version} {state}")
    finally:
        services.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", choices=DEMOS)
    demo = DEMOS[parser.parse_args().demo]
    publish_all(demo.path, demo.prompts, demo.store)


if __name__ == "__main__":
    main()
