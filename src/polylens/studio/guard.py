"""Who may ask the studio for what: a wall around the whole page, below which Gradio runs.

Gradio offers more than the studio uses: it serves files, takes uploads, fetches addresses. Instead
of trusting each of those to be shut, all addresses but the few that a page needs are refused here,
whatever is said to Gradio. A browser is told to load nothing from elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What a page of Gradio asks for, and the studio's own downloads.
_ADDRESSES = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[\w./~-]+"
    r"|/gradio_api/(info|startup-events|theme\.css|app_id|queue/join|queue/data|cancel|reset"
    r"|heartbeat/\w+)|/runs/[\w.-]+/[a-z]+"
)

# Gradio writes its own scripts and styles into the page, and plotly compiles some of its code.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
)


@dataclass(frozen=True)
class Guard:
    """Passes on what is allowed.

    Attributes:
        app: what is guarded.
        password: asked for with any user name; None asks for none.
        local: whether only this machine may name itself in addresses, so that a page elsewhere
            cannot reach the studio through a name that points here.
    """

    app: App
    password: str | None
    local: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        refusal = self.refusal(scope["type"], scope.get("path", ""), headers)
        if refusal is not None:
            status, text = refusal
            await _refuse(send, status, text)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = list(message["headers"])
                if b"content-security-policy" not in {key.lower() for key, _ in given}:
                    given.append((b"content-security-policy", _POLICY.encode()))
                given.append((b"referrer-policy", b"no-referrer"))
                given.append((b"x-content-type-options", b"nosniff"))
                message = {**message, "headers": given}
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def refusal(self, kind: str, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """Return status and reason if a request is to be refused.

        Args:
            kind: "http" or "websocket".
            path: of the address, decoded.
            headers: by lower-case name.
        """
        host = headers.get("host", "")
        if self.local and not is_local(re.sub(r":\d+$", "", host).strip("[]")):
            return 403, "the studio listens to this machine alone"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "another site's page may not use the studio"
        if self.password is not None and not _knows(
            headers.get("authorization", ""), self.password
        ):
            return 401, "a password is needed"
        if kind != "http" or ".." in path.split("/") or not _ADDRESSES.fullmatch(path):
            return 403, "the studio offers nothing at this address"
        return None


def is_local(host: str) -> bool:
    """Whether an address is this machine's own, which nobody else reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _knows(authorization: str, password: str) -> bool:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return False
    try:
        given = base64.b64decode(encoded, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(given, password.encode())


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="PolyLens studio", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
