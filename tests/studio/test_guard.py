"""What passes the wall before Gradio, and what does not."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from polylens.studio.guard import Guard

HERE = {"host": "127.0.0.1:7860"}


async def everything(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers whatever it is asked."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"reached"})


def ask(guard: Guard, path: str, headers: dict[str, str], kind: str = "http") -> tuple[int, Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    asyncio.run(guard({"type": kind, "path": path, "headers": raw}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def basic(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/config",
        "/theme.css",
        "/assets/index-DeS0_x1.js",
        "/static/img/logo.svg",
        "/gradio_api/queue/join",
        "/gradio_api/queue/data",
        "/gradio_api/heartbeat/abc123",
        "/runs/first/report",
        "/runs/a..b/report",
    ],
)
def test_a_page_gets_what_it_needs(path: str) -> None:
    status, headers = ask(Guard(everything, None, True), path, HERE)
    assert status == 200
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy  # no other site is named


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api//file=/etc/passwd",
        "//gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/upload_progress",
        "/gradio_api/proxy=http://example.com",
        "/gradio_api/vibe-edit",
        "/gradio_api/component_server",
        "/gradio_api/process_recording",
        "/gradio_api/deep_link",
        "/gradio_api/openapi.json",
        "/gradio_api/call/anything",
        "/gradio_api/run/predict",
        "/monitoring",
        "/login",
        "/docs",
        "/static/../../../../etc/passwd",
        "/assets/../config",
        "/runs/../../etc/passwd",
        "/runs/../report",
        "/runs/first/../../x",
        "/",
    ],
)
def test_nothing_else_is_reached(path: str) -> None:
    kind = "websocket" if path == "/" else "http"
    status, _ = ask(Guard(everything, None, True), path, HERE, kind)
    assert status == 403


def test_other_sites_pages_and_names_are_refused() -> None:
    guard = Guard(everything, None, True)
    assert ask(guard, "/", {"host": "evil.example"})[0] == 403
    assert ask(guard, "/", {})[0] == 403
    assert ask(guard, "/", {**HERE, "origin": "http://evil.example"})[0] == 403
    assert ask(guard, "/", {**HERE, "origin": "null"})[0] == 403
    assert ask(guard, "/", {**HERE, "origin": "http://127.0.0.1:7861"})[0] == 403
    assert ask(guard, "/", {**HERE, "origin": "http://127.0.0.1:7860"})[0] == 200
    assert ask(guard, "/", {"host": "localhost:7860"})[0] == 200
    assert ask(guard, "/", {"host": "[::1]:7860"})[0] == 200
    assert ask(guard, "/", {"host": "127.0.0.9"})[0] == 200
    assert ask(Guard(everything, "x", False), "/", {"host": "box.lan", **basic("x")})[0] == 200


@pytest.mark.parametrize("path", ["/", "/gradio_api/queue/join", "/runs/first/delta", "/theme.css"])
def test_every_address_asks_for_the_password(path: str) -> None:
    guard = Guard(everything, "schön: geheim", False)
    for wrong in (
        {},
        basic(""),
        basic("schön"),
        basic("schön: geheim "),
        {"authorization": "Basic !"},
        {"authorization": "Bearer schön: geheim"},
    ):
        raw = {key: value.encode().decode("latin-1") for key, value in wrong.items()}
        status, headers = ask(guard, path, {**HERE, **raw})
        assert status == 401
        assert b"www-authenticate" in headers
    assert ask(guard, path, {**HERE, **basic("schön: geheim")})[0] == 200
