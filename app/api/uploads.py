"""Reading multipart bodies, of uploads and training data: their parts, each a file."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from app.errors import InvalidRequest, PayloadTooLarge
from app.serving.publishing.upload import TASK, Upload
from app.store.files import write_error
from app.store.source_files import CONFIG, PROMPT
from app.strict_json import JsonError, parse_json

PARTS = (PROMPT, CONFIG, TASK)
ADVICE = (
    "the parts prompt (safetensors), config (adapter_config.json) and task (JSON): "
    "curl -F prompt=@adapter_model.safetensors -F config=@adapter_config.json"
)
MAX_JSON_PART_BYTES = 1 << 20
_MAX_PARTS = 8
_TAIL_BYTES = 512  # more than the longest boundary


@contextlib.asynccontextmanager
async def upload_form(
    request: Request, parts: Sequence[str] = PARTS, advice: str = ADVICE
) -> AsyncIterator[FormData]:
    """Stream the body to temporary files, which are gone afterwards. Raise InvalidRequest, StoreFull."""
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        raise HTTPException(415, f"Send multipart/form-data with {advice}")
    form = await _read_form(request)
    try:
        _check_names([name for name, _ in form.multi_items()], parts)
        yield form
    finally:
        await form.close()


async def _read_form(request: Request) -> FormData:
    try:
        return await _FormReader(request).parse()
    except MultiPartException as error:
        raise HTTPException(400, f"The multipart body can't be read: {error.message.rstrip('.')}.") from None
    except OSError as error:
        if error.errno is None:  # no system call's: the connection's
            raise
        raise write_error(error) from error  # of a temporary file


def _check_names(names: list[str], parts: Sequence[str]) -> None:
    unknown = sorted({name[:64] for name in names if name not in parts})
    if unknown:
        raise InvalidRequest(f"There is no part {', '.join(unknown)}; the parts are {', '.join(parts)}.")
    if len(set(names)) < len(names):
        raise InvalidRequest("A part was sent twice; send each once.")


class _FormReader(MultiPartParser):
    """Starlette's parser, but it refuses a body that stops before its closing boundary.

    Every part is a file, so that its bytes stay as they came, whatever charset the body claims.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request.headers, self._whole(request.stream()), max_files=_MAX_PARTS, max_fields=0)
        self._has_end = False

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Raise MultiPartException where the body stops before its closing boundary, or goes on after it."""
        boundary = parse_options_header(self.headers["content-type"])[1].get(b"boundary", b"")
        before = b""
        async for chunk in stream:
            had_end = self._has_end
            yield chunk  # it is parsed now
            seen = before + chunk
            if self._has_end and (chunk if had_end else seen.partition(b"\r\n--%s--" % boundary)[2]).strip():
                raise MultiPartException("something follows its closing boundary; send the parts alone")
            before = seen[-_TAIL_BYTES:]
        if not self._has_end:
            raise MultiPartException("it stops before its closing boundary; send all of it")

    def on_headers_finished(self) -> None:
        """Take a part's name from its one Content-Disposition header."""
        part = self._current_part
        names = [value for header, value in part.item_headers if header == b"content-disposition"]
        if len(names) > 1:
            raise MultiPartException("A part has two Content-Disposition headers")
        part.content_disposition = b'form-data; filename=""; ' + b"".join(names)
        super().on_headers_finished()

    def on_end(self) -> None:
        """Note the closing boundary."""
        self._has_end = True


async def read_upload(form: FormData, *, alias: str | None, who: str) -> Upload:
    """Read the parts into memory. Raise PayloadTooLarge, InvalidRequest."""
    files = {name: await _read(file_part(form, name), name) for name in form if name != TASK}
    return Upload(files=files, task=await json_part(form, TASK), alias=alias, who=who)


def file_part(form: FormData, name: str) -> UploadFile:
    """Return a part that is there."""
    part = form[name]
    assert isinstance(part, UploadFile)  # every part is a file
    return part


async def json_part(form: FormData, name: str) -> dict[str, Any] | None:
    """Return the object in a part; None: there is no such part. Raise PayloadTooLarge, InvalidRequest."""
    if name not in form:
        return None
    try:
        value = parse_json(await _read(file_part(form, name), name))
    except JsonError as error:
        raise InvalidRequest(f"The part {name} can't be read: {error}.", param=name) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The part {name} must be a JSON object.", param=name)
    return value


async def _read(part: UploadFile, name: str) -> bytes:
    if name != PROMPT and (part.size or 0) > MAX_JSON_PART_BYTES:
        raise PayloadTooLarge(f"The part {name} exceeds {MAX_JSON_PART_BYTES} bytes.")
    return await part.read()
