"""What every request must pass and every answer carry: known hosts, our own origin, headers that allow nothing more."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "host_names", "is_loopback"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def host_names(host: str) -> frozenset[str]:
    """The names under which a server on `host` may be asked for."""
    if is_loopback(host):
        return _LOOPBACK | {host}
    return _LOOPBACK | {host, socket.gethostname().lower(), socket.getfqdn().lower()}


class Guard:
    """Refuses a foreign Host (DNS rebinding) and a foreign Origin (forged requests); adds the headers."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], remote: bool = False) -> None:
        """remote: any address will do as a host; a page that is bound to a name of its own cannot send one."""
        self.app, self.hosts, self.remote = app, frozenset(hosts), remote

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        wrong = self._wrong(scope["method"], Headers(scope=scope))
        app = PlainTextResponse(wrong, status_code=403) if wrong else self.app
        await app(scope, receive, guarded)

    def _wrong(self, method: str, headers: Headers) -> str:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if name not in self.hosts and not (self.remote and _address(name) is not None):
            return "This server is not known under that name. Open the link that it printed."
        if method in ("GET", "HEAD"):
            return ""
        # A form under our referrer policy sends the origin "null": then the session's own token decides.
        origin, site = headers.get("origin", "null"), headers.get("sec-fetch-site", "same-origin")
        if site != "same-origin" or (origin != "null" and urlsplit(origin).netloc != host):
            return "This request came from another site, and was refused."
        return ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
