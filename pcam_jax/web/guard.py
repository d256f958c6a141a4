"""What stands before every request: who may ask, how the answer is fenced in, and how it is counted."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pcam_jax.web.metrics import Metrics

OPEN_PATHS = ("/", "/healthz", "/readyz")
"""Answered without a token: the page is empty without what it asks for with one."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=(), interest-cohort=()",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware.

    Args:
        app: the service.
        policy: value of Content-Security-Policy.
        metrics: where requests are counted.
        paths: known paths; others are counted together, so that nobody can make counters without end.
        token: what ``Authorization: Bearer`` must hold, or "".
        hosts: names under which the service may be asked (a page that had its own name resolved to this machine
            would otherwise be of the same origin); empty allows all.
        root_path: prefix under which a proxy offers the service.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        policy: str,
        metrics: Metrics,
        paths: Sequence[str],
        token: str = "",
        hosts: Sequence[str] = (),
        root_path: str = "",
    ) -> None:
        self._app = app
        self._policy = policy
        self._metrics = metrics
        self._paths = frozenset(paths)
        self._token = token.encode()
        self._hosts = frozenset(hosts)
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, pass it on, and complete the answer's headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        path = scope["path"]
        if self._root_path and path.startswith(self._root_path + "/"):  # a proxy may strip the prefix or not
            path = path.removeprefix(self._root_path)
        counted = path if path in self._paths else "other"
        status = 500

        async def send_fenced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Content-Security-Policy", self._policy)
            await send(message)

        try:
            refused = self._refusal(scope, path)
            if refused is not None:
                await _say(send_fenced, *refused)
            else:
                # HEAD is GET without the body, which the server leaves out
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                inner = {**scope, "method": method, "root_path": self._root_path}
                await self._app(inner, receive, send_fenced)
        finally:
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
            self._metrics.requests.labels(counted, method, str(status)).inc()
            self._metrics.seconds.labels(counted).observe(time.monotonic() - started)

    def _refusal(self, scope: Scope, path: str) -> tuple[int, str, dict[str, str]] | None:
        headers = Headers(scope=scope)
        if self._hosts and _host(headers.get("host", "")) not in self._hosts:
            return 400, "The service is not known under this name: start it with --allow-host NAME.", {}
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] not in ("GET", "HEAD"):
            return 403, "Another web site may not send pictures: open the service's own page.", {}
        if self._token and path not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # compared in constant time, so that a guess does not learn how far it was right
            right = hmac.compare_digest(given.strip().encode(), self._token)
            if scheme.lower() != "bearer" or not right:
                wanted = {"WWW-Authenticate": 'Bearer realm="pcam-jax"'}
                return 401, "The token is missing or wrong: send `Authorization: Bearer TOKEN`.", wanted
        return None


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    if header.startswith("["):
        return header.partition("]")[0].lower() + "]"
    return header.partition(":")[0].lower()


async def _say(send: Send, status: int, sentence: str, headers: dict[str, str]) -> None:
    body = json.dumps({"error": sentence}).encode()
    raw: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
