"""Which base a prompt is trained on: the one that is named, else the server's, else the demo's."""

from dataclasses import dataclass
from pathlib import Path

from app.cli.server import CommandFailed, NoAnswer, ServerClient
from app.cli.training.options import TrainOptions
from app.settings import Settings

_DEMO = Path(Settings.model_fields["model"].default)


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base that a server runs."""

    url: str
    name: str
    fingerprint: str


def find_served(options: TrainOptions) -> ServedBase | None:
    """Return the server's base where it matters; None: nothing answers, and nothing is to be pushed.

    Raise NoAnswer, CommandFailed.
    """
    if options.model is not None and not options.push:
        return None
    with ServerClient(options.server, options.key) as client:
        try:
            info = client.call("GET", "/info")
        except NoAnswer:
            if options.push:
                raise
            return None
    return ServedBase(options.server, info["model_id"], info["model_fingerprint"])


def choose_model(options: TrainOptions, served: ServedBase | None) -> str:
    """Return a directory or hub id. Raise ValueError: the server's base isn't found here by its name."""
    if options.model is not None:
        return options.model
    if served is None:
        if not _DEMO.is_dir():
            raise ValueError(f"there is no {_DEMO} here; name a base with --model")
        return str(_DEMO)
    for path in (_DEMO.parent / served.name, Path(served.name)):
        if (path / "config.json").is_file():
            return str(path)
    raise ValueError(
        f"the server at {served.url} runs {served.name}; name its directory or hub id here with --model"
    )


def check_same_base(served: ServedBase | None, model: str, fingerprint: str) -> None:
    """Raise CommandFailed: the prompt would be trained on another base than the server runs."""
    if served is not None and served.fingerprint != fingerprint:
        raise CommandFailed(
            f"the server at {served.url} runs {served.name} ({served.fingerprint[:12]}), but {model} is "
            f"another base ({fingerprint[:12]}): a prompt works only on the base that it was trained on; "
            "name the server's with --model, or another server with --server"
        )
