"""Who may call, and how much they may send: one ASGI layer in front of everything.

- Without an API key the server listens on this machine only, and a request's Host must name this machine: a web site
  that points its own name at 127.0.0.1 (DNS rebinding) is refused.
- A browser says which site a request comes from: only the server's own pages may call it, or those of `allow_origin`.
- With an API key, everything but the page and /health needs ``Authorization: Bearer KEY``, compared in constant time.
- A body is read up to a limit, and no answer can be framed, sniffed or cached into something else.
- Every body is JSON, whatever its Content-Type says: `curl -d` and many small clients send none, or that of a form.
"""

import hmac
import ipaddress
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.serve.api_errors import ApiError

MAX_BODY = 1 << 20  # bytes
TOO_LARGE = "body_too_large"
OPEN_PATHS = ("/", "/health")  # need no key: neither says anything about anybody


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """The layer. key None: only hosts of this machine; count(path, status) is told of every answer."""

    def __init__(self, app: ASGIApp, key: str | None, allow_origin: str | None, count: Callable[[str, int], None]):
        self._app, self._key, self._count = app, key, count
        self._allowed = allow_origin.rstrip("/").lower() if allow_origin else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope = {**scope, "headers": _as_json(scope["headers"])}
        foreign = self._allowed is not None and headers.get("origin", "").lower() == self._allowed
        status, started = 0, False

        async def respond(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                more = MutableHeaders(scope=message)
                more.setdefault("Cache-Control", "no-store")
                more["X-Content-Type-Options"] = "nosniff"
                more["Referrer-Policy"] = "no-referrer"
                more.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
                if foreign:
                    more["Access-Control-Allow-Origin"] = headers["origin"]
                    more["Vary"] = "Origin"
            await send(message)

        try:
            self._check(scope, headers, foreign)
            if foreign and scope["method"] == "OPTIONS":
                await _preflight(respond)
                return
            await self._app(scope, _limited(headers, receive), respond)
        except ApiError as error:
            if started:
                raise
            await error.response()(scope, receive, respond)
        except Exception:
            status = 500  # what the layer above answers
            raise
        finally:
            route = scope.get("route")
            self._count(getattr(route, "path", "other"), status or 499)

    def _check(self, scope: Scope, headers: Headers, foreign: bool) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._key is None and not is_loopback(_name(host)):
            message = "this server answers only to the names of its own machine, such as localhost"
            raise ApiError(403, message, kind="permission_error", code="host_not_allowed")
        if origin is not None and not foreign and origin.lower() != f"{scope['scheme']}://{host}".lower():
            message = "requests from other web sites are refused; start the server with --allow_origin to let one in"
            raise ApiError(403, message, kind="permission_error", code="origin_not_allowed")
        preflight = foreign and scope["method"] == "OPTIONS"  # browsers send it without the key
        if self._key is not None and scope["path"] not in OPEN_PATHS and not preflight:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(
                    401,
                    "this server needs its API key: send the header 'Authorization: Bearer KEY'",
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )


def _as_json(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in headers if name.lower() != b"content-type"]
    return [*others, (b"content-type", b"application/json")]


def _name(host: str) -> str:
    """The host of a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _limited(headers: Headers, receive: Receive) -> Receive:
    """`receive`, refusing a body longer than MAX_BODY: ApiError if it says so, HTTPException (413) if it does not."""
    message = f"the request's body is longer than {MAX_BODY:,} bytes"
    closing = {"Connection": "close"}
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > MAX_BODY:
        raise ApiError(413, message, code=TOO_LARGE, headers=closing)
    total = 0

    async def limited() -> Message:
        nonlocal total
        received = await receive()
        if received["type"] == "http.request":
            total += len(received.get("body", b""))
            if total > MAX_BODY:  # the application is reading: it lets only this kind of exception pass
                raise HTTPException(413, message, closing)
        return received

    return limited
