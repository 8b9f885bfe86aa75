"""A real HTTP server on this machine that answers as a test tells it and keeps what it saw."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]  # status, body, headers


class Server:
    """Answers with what `reply` makes of (a request's body, how many came before), and keeps what it saw."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, n: (200, {}, {})
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.prompt_tokens = self.completion_tokens = 0  # of the answers given
        self.now = self.most = 0  # requests under way
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.block_on_close = True, False
        self.base_url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            n = len(self.seen)
            self.seen.append(body | {"path": handler.path})
            self.headers.append({k.lower(): v for k, v in handler.headers.items()})
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        status, content, headers = self.reply(body, n)
        with self.lock:
            self.now -= 1
            if status == 200 and isinstance(content, dict) and content.get("usage"):
                self.prompt_tokens += content["usage"].get("prompt_tokens", 0)
                self.completion_tokens += content["usage"].get("completion_tokens", 0)
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", headers.get("Content-Type", "application/json"))
            handler.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                if name != "Content-Type":
                    handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # the client has gone, as it may

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
