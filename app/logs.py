"""How the process logs: every record of every library as one line on stderr, text or JSON."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

from app.one_line import on_one_line

LogFormat = Literal["text", "json"]


def configure_logging(log_format: LogFormat, level: str) -> None:
    """Send all records to stderr. A record's attribute `fields`, a dict, is shown beside its message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def take_over_libraries(log_format: LogFormat) -> None:
    """Libraries with handlers of their own, and Python's warnings, go the same way; bars are for people."""
    logging.captureWarnings(True)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the model hub's client, request by request
    for name in ("huggingface_hub", "transformers"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    if log_format == "json":
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bars()
        disable_progress_bar()


def _formatter(log_format: LogFormat) -> logging.Formatter:
    """Records come from the standard library's loggers alone."""
    return _TextFormatter() if log_format == "text" else _json_formatter()


def _json_formatter() -> logging.Formatter:
    """Structlog renders the lines."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_fields,
            structlog.processors.format_exc_info,
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )


def _add_fields(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.update(getattr(event["_record"], "fields", {}))
    return event


_fields_in_text = structlog.processors.LogfmtRenderer(bool_as_flag=False)


class _TextFormatter(logging.Formatter):
    """`INFO message name=value ...`, with a traceback on lines of its own.

    Each request has a line, so that the event loop formats it: this takes half of structlog's time.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = _fields_in_text(None, "", dict(getattr(record, "fields", ())))
        line = " ".join(filter(None, (record.levelname, on_one_line(record.getMessage()), fields)))
        error = record.exc_info
        return line if error is None or error[0] is None else f"{line}\n{self.formatException(error)}"
