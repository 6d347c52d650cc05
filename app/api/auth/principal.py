"""The principal of a request: its key, and which tasks it may see and use."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.errors import Forbidden
from app.keys.key import Key, Scope
from app.keys.keyring import Keyring

NO_NAME = "http"  # in records of a server without keys


@dataclass(frozen=True, slots=True)
class Principal:
    """The principal of a request that was admitted. Without keys every task may be used."""

    key: Key | None = None
    keys: Keyring | None = None  # where the key was found

    @property
    def tenant(self) -> str:
        """The unit of fair share; "" for all requests without a key."""
        return "" if self.key is None else self.key.name

    @property
    def who(self) -> str:
        """The name for records."""
        return NO_NAME if self.key is None else self.key.name

    @property
    def is_bound(self) -> bool:
        """Whether there are tasks that the caller must not know about."""
        return self.key is not None and self.key.tasks is not None

    def may_use(self, name: str) -> bool:
        """Whether the caller may use a task, or the base model, by its name."""
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
        """Raise Forbidden or RateLimited unless the caller may generate now; `what` begins the message."""
        if self.key is None or self.keys is None:
            return
        if Scope.GENERATE not in self.key.scopes:
            raise Forbidden(
                f"{what}, so they need a key with the scope generate too; this one has "
                f"{', '.join(sorted(self.key.scopes))}. Leave them out, or use another key."
            )
        self.keys.check_tokens(self.key)


async def principal(request: Request) -> Principal:
    """Return the principal that was admitted."""
    found = request.state.principal
    assert isinstance(found, Principal)
    return found


CurrentPrincipal = Annotated[Principal, Depends(principal)]
ANONYMOUS = Principal()
