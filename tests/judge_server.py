"""A judge on this machine: a real server that answers in OpenAI's format, as a function says."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = tuple[int, dict[str, str], Any]
LAST_ANSWER = re.compile(r"<assistant>\n(.*?)\n</assistant>", re.DOTALL)


class Server(ThreadingHTTPServer):
    """A judge that answers as a function of the prompt says, in OpenAI's format."""

    daemon_threads = True

    def __init__(self, say: Callable[[str], str | Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.say = say
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.lock = threading.Lock()

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that have gone."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            said = self.server.say(body["messages"][0]["content"])
        if isinstance(said, str):
            said = 200, {}, completion(said)
        status, headers, payload = said
        content = json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def completion(text: str) -> dict[str, Any]:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


def failure(status: int, message: str = "no", **headers: str) -> Answer:
    return status, headers, {"error": {"message": message, "param": None}}


Serve = Callable[[Callable[[str], "str | Answer"]], Server]


def merit(answer: str) -> int:
    return int(answer.rsplit(maxsplit=1)[1])


def fair(prompt: str) -> str:
    """Judge answers by what they say they deserve."""
    last = LAST_ANSWER.findall(prompt)
    if "[[number]]" in prompt:
        return f"Fine. [[{merit(last[-1])}]]"
    first, second = merit(last[len(last) // 2 - 1]), merit(last[-1])
    return f"So: [[{'A' if first > second else 'B' if second > first else 'C'}]]"


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start servers, and end them afterwards; no key is set, and no proxy stands between."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    servers = []

    def start(say: Callable[[str], str | Answer]) -> Server:
        server = Server(say)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
