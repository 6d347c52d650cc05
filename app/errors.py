"""The exception tree. Rooms raise these; `app/api/errors.py` alone maps them to HTTP.

PromptplexError
├── InvalidRequest            the request itself is wrong
│   └── RequestTooLong        it could never fit, however long it waited
│       └── ContextLengthExceeded  the same, as clients of OpenAI's know it
├── PromptRejected            an upload that must not be served
│   └── UnsafeFile            not the strict safetensors that we accept
├── NotFound                  no such task, version or alias
├── NotServable               the task exists, but not on the loaded base
├── Conflict                  another client moved first
├── PayloadTooLarge
├── Unauthorized              no key, or none that is known
├── Forbidden                 the key doesn't reach so far
├── Unavailable               try again later
│   ├── Overloaded            the queue is full
│   ├── RateLimited           the key has used up its quota
│   └── EngineStopped         draining or dead
├── DeadlineExceeded
├── Cancelled                 the caller went away
├── NonFiniteLogits           the model produced NaN or infinity for this row
├── ConstraintFailed          a row's grammar or bias left nothing to generate
├── CorruptData               stored bytes that no longer hash to their name
├── StoreFull                 no room to make an upload durable
└── UnsupportedModel          a base that we can't serve exactly

Messages are for the user: what was wrong, what was expected, what to do next. They never hold
paths, tracebacks or other internals of the server.
"""


class PromptplexError(Exception):
    """Root of everything that Promptplex raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(PromptplexError):
    """The request is wrong; `param` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestTooLong(InvalidRequest):
    """The request exceeds a position or memory limit even when it runs alone.

    There is room for `limit` tokens where that isn't the model's own limit; `asked` says in words for what.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        limit: int | None = None,
        asked: str = "more than that",
    ) -> None:
        super().__init__(message, param=param)
        self.limit = limit
        self.asked = asked


class ContextLengthExceeded(RequestTooLong):
    """The same, in the words of clients that know no other name for it."""


class PromptRejected(PromptplexError):
    """An uploaded prompt doesn't fit; says which tensor, what was expected and what came."""

    def __init__(
        self,
        message: str,
        *,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
    ) -> None:
        details = [message]
        if tensor is not None:
            details.append(f"tensor: {tensor}")
        if expected is not None:
            details.append(f"expected: {expected}")
        if found is not None:
            details.append(f"found: {found}")
        super().__init__("; ".join(details))
        self.tensor = tensor
        self.expected = expected
        self.found = found


class UnsafeFile(PromptRejected):
    """The bytes are not a well-formed safetensors file within our limits."""


class NotFound(PromptplexError):
    """No such task, version or alias."""


class NotServable(PromptplexError):
    """The task exists, but its prompt doesn't fit the loaded base model; says why."""


class Conflict(PromptplexError):
    """A compare-and-set lost: another client moved first."""


class PayloadTooLarge(PromptplexError):
    """The body exceeds its documented bound."""


class Unauthorized(PromptplexError):
    """The request carries no key, or none that is valid."""


class Forbidden(PromptplexError):
    """The key is valid, but lacks the scope or the task."""


class Unavailable(PromptplexError):
    """Nothing is wrong with the request; try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """The bounded queue is full."""


class RateLimited(Unavailable):
    """The key has used up its quota of requests or tokens."""


class EngineStopped(Unavailable):
    """The engine is loading, draining or dead."""


class DeadlineExceeded(PromptplexError):
    """The request's deadline passed before it finished."""


class Cancelled(PromptplexError):
    """The caller went away or asked to stop."""


class NonFiniteLogits(PromptplexError):
    """The model produced NaN or infinite logits for this row; its neighbours are unaffected."""


class RequestFailed(PromptplexError):
    """The model or the engine failed on this request alone; others are unaffected."""


class ConstraintFailed(PromptplexError):
    """This row's grammar or bias leaves no token, or the grammar became too complex; neighbours go on."""


class CorruptData(PromptplexError):
    """Stored bytes no longer hash to the digest that names them; they are never served."""


class StoreFull(PromptplexError):
    """The store could not make the upload durable; nothing was acknowledged."""


class UnsupportedModel(PromptplexError):
    """The base model can't be served exactly; names the architecture and the measured figure."""
