"""As much of a W&B server as a run needs to start one and to lose it: nothing is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DOWN = "/down"  # a request for this path is the last one that is answered


def _answer() -> dict[str, Any]:
    """One answer that serves every query: wandb takes the fields that it asked for."""
    project = {"id": "p", "name": "mm", "entity": {"id": "e", "name": "faults"}}
    names = ("id", "name", "displayName")
    bucket: dict[str, Any] = {**dict.fromkeys(names, "run"), "project": project}
    return {
        "upsertBucket": {"bucket": bucket, "inserted": True},
        "createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []},
        "serverInfo": {"features": []},
        "viewer": {"id": "v", "entity": "faults", "teams": {"edges": []}},
        "model": {"bucket": None},
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def _any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.down:  # a connection that was kept open: closed without an answer
            self.close_connection = True
            return
        data = json.dumps({"data": _answer()} if "graphql" in self.path else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        if self.path == DOWN:
            self.server.down = True
            # of a thread of its own: `shutdown` waits for the loop that may be waiting for this
            threading.Thread(target=self.server.stop, daemon=True).start()

    do_GET = do_POST = do_PUT = _any  # noqa: N815  names that http.server asks for

    def log_message(self, format: str, *args: Any) -> None:
        return None


class WandbServer(ThreadingHTTPServer):
    """Answers until it is asked for `DOWN`; from then on connections are refused or dropped."""

    daemon_threads = True
    down = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Close the port."""
        self.down = True
        self.shutdown()
        self.server_close()


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a port of its own, in a thread."""
    server = WandbServer()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.stop()
