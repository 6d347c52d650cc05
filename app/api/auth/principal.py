"""Who calls: the key behind a request, and which tasks it may see and use."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.errors import Forbidden
from app.keys.key import Key, Scope
from app.keys.keyring import Keyring

NO_NAME = "http"  # who did it, in records of a server without keys


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request that may reach its route. Without keys everybody may use every task."""

    key: Key | None = None
    keys: Keyring | None = None  # where the key was found

    @property
    def tenant(self) -> str:
        """The party that shares the engine with others; "" is all who have no key."""
        return "" if self.key is None else self.key.name

    @property
    def who(self) -> str:
        """The name for records."""
        return NO_NAME if self.key is None else self.key.name

    @property
    def is_bound(self) -> bool:
        """Whether there are tasks that the caller must not know of."""
        return self.key is not None and self.key.tasks is not None

    def may_use(self, name: str) -> bool:
        """Whether a task id, or the base model's name, is among the caller's."""
        return self.key is None or self.key.may_use(name)

    def require(self, reference: str) -> None:
        """Raise Forbidden unless the caller may use a task reference, or the base model by its name.

        The message is the same whether there is such a task or not.
        """
        name = reference.partition("@")[0]
        if self.key is not None and not self.key.may_use(name):
            raise Forbidden(
                f"This key doesn't reach {name[:128]!r}; it is for {', '.join(self.key.tasks or ())}. "
                "The server's operator can make a key for other tasks."
            )

    def require_generation(self, what: str) -> None:
        """Raise Forbidden or RateLimited unless the model may answer the caller now; `what` asks it to."""
        if self.key is None or self.keys is None:
            return
        if Scope.GENERATE not in self.key.scopes:
            raise Forbidden(
                f"{what}, so they need a key with the scope generate too; this one has "
                f"{', '.join(sorted(self.key.scopes))}. Leave them out, or use another key."
            )
        self.keys.check_tokens(self.key)


async def caller(request: Request) -> Caller:
    """Whoever was let in to the route."""
    found = request.state.caller
    assert isinstance(found, Caller)
    return found


Calling = Annotated[Caller, Depends(caller)]
EVERYBODY = Caller()
