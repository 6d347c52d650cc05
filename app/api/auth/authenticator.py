"""Decide which request may reach which route, before any of the body is read.

Each route declares what it needs: `@needs(Scope.GENERATE)`, `@any_key` or `@public`, below its
`@router` line. A route that declares nothing is closed to every key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match
from starlette.types import Scope as AsgiScope

from app.api.auth.principal import ANONYMOUS, Principal
from app.api.errors import error_response
from app.errors import Forbidden, PromptplexError, RateLimited, Unauthorized
from app.keys.key import Key, Scope
from app.keys.keyring import Keyring

_T = TypeVar("_T")

_DECLARED = "__access__"
_REASONS: dict[type[PromptplexError], str] = {
    Unauthorized: "unauthorized",
    Forbidden: "forbidden",
    RateLimited: "rate_limited",
}


@dataclass(frozen=True, slots=True)
class Access:
    """What a route needs: nothing (public), any key, or a key with one of some scopes."""

    scopes: frozenset[Scope] = frozenset()  # none: any key
    is_public: bool = False

    @property
    def is_counted(self) -> bool:
        """Whether its requests count against a key's quota; requests about the server don't."""
        return bool(self.scopes - {Scope.METRICS})

    @property
    def needs_tokens(self) -> bool:
        """Whether it is refused while its key has used up its tokens."""
        return self.scopes == {Scope.GENERATE}


def needs(*scopes: Scope) -> Callable[[_T], _T]:
    """Declare that a route needs a key with one of these scopes."""
    return lambda endpoint: _declare(endpoint, Access(frozenset(scopes)))


def any_key(endpoint: _T) -> _T:
    """Declare that a route needs any valid key."""
    return _declare(endpoint, Access())


def public(endpoint: _T) -> _T:
    """Declare that a route, or a mounted app, needs no key."""
    return _declare(endpoint, Access(is_public=True))


def declared_access(route: Any) -> Access | None:
    """Return what a route, or the app mounted there, declares; None: nothing."""
    endpoint = getattr(route, "endpoint", None) or getattr(route, "app", None)
    found = getattr(endpoint, _DECLARED, None)
    return found if isinstance(found, Access) else None


def _declare(endpoint: _T, access: Access) -> _T:
    setattr(endpoint, _DECLARED, access)
    return endpoint


class Authenticator:
    """Admit requests, or answer why not."""

    def __init__(self, keys: Keyring | None, on_refusal: Callable[[str], None]) -> None:
        """`keys` None: no key is needed. `on_refusal` is called with the reason of every refusal."""
        self._keys = keys
        self._on_refusal = on_refusal

    def refusal(self, scope: AsgiScope) -> JSONResponse | None:
        """Return the answer to a refused request; None: it is admitted, and its caller is in the scope."""
        if self._keys is None:
            scope["state"]["principal"] = ANONYMOUS
            return None
        try:
            self._let_in(scope, self._keys)
        except (Unauthorized, Forbidden, RateLimited) as error:
            self._on_refusal(_REASONS[type(error)])
            return error_response(error)
        return None

    def _let_in(self, scope: AsgiScope, keys: Keyring) -> None:
        """Raises Unauthorized, Forbidden, RateLimited."""
        route = _matching(scope["app"].routes, scope)
        access = None if route is None else declared_access(route)
        if access is not None and access.is_public:
            return
        key = keys.find(_key_in(Headers(scope=scope)))
        if key is None:
            raise Unauthorized(
                "This server needs a key: send Authorization: Bearer <key> (or x-api-key: <key>)."
                " Its operator makes keys with `promptplex keys add`."
            )
        scope["state"]["principal"] = Principal(key, keys)
        if route is None:
            return  # 404 or 405
        if access is None:
            raise Forbidden("This route is closed to all keys.")
        _check_scope(key, access)
        if access.is_counted:
            keys.take(key, needs_tokens=access.needs_tokens)


def _matching(routes: Sequence[BaseRoute], scope: AsgiScope) -> Any:
    """Return the route that the router will choose: the first that matches path and method."""
    for route in iter_route_contexts(routes):
        if route.matches(scope)[0] is Match.FULL:
            return route
    return None


def _check_scope(key: Key, access: Access) -> None:
    if access.scopes and not access.scopes & key.scopes:
        wanted = " or ".join(sorted(access.scopes))
        raise Forbidden(
            f"This route needs a key with the scope {wanted}; this one has {', '.join(sorted(key.scopes))}."
        )


def _key_in(headers: Headers) -> str:
    """Return the one key of a request, in either header; "" where there is none or more than one."""
    bearers, plain = headers.getlist("authorization"), headers.getlist("x-api-key")
    given = {*map(_bearer, bearers), *map(str.strip, plain)}
    return given.pop() if len(given) == 1 and max(len(bearers), len(plain)) == 1 else ""


def _bearer(value: str) -> str:
    scheme, _, token = value.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
