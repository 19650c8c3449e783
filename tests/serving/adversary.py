"""A server that misbehaves in one way; `python -m tests.serving.adversary KIND` prints its port and serves.

Kinds: silent (no answer), trickling (a byte now and then, for ever), trickling_headers, prose (an answer that is not
JSON), html (not a chat completion), failing (status 500), redirecting, slow (a valid answer after 0.1 s), recovering
(three times prose, then valid answers), valid.
"""

import contextlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER = '{"button": "up", "reasoning": "", "context": ""}'


class Adversary(ThreadingHTTPServer):
    """A server of one kind; `paths` are those that were asked for."""

    daemon_threads = True

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind, self.paths, self.questions = kind, [], itertools.count(1)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.ended = threading.Event()

    def handle_error(self, *request: object) -> None:
        """Report nothing: clients close connections in the middle of an answer."""


class _Handler(BaseHTTPRequestHandler):
    server: Adversary

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": "model"}]})

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
        kind, number = self.server.kind, next(self.server.questions)
        if kind == "silent":
            self.server.ended.wait()
        elif kind.startswith("trickling"):
            self._trickle(in_headers=kind == "trickling_headers")
        elif kind == "failing":
            self.send_error(500, "out of memory")
        elif kind == "redirecting":
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "html":
            self._send(b"<html>it works</html>")
        elif kind == "prose" or (kind == "recovering" and number <= 3):
            self._say("I press up!")
        else:
            if kind == "slow":
                time.sleep(0.1)
            self._say(ANSWER)

    def _say(self, text: str) -> None:
        message = {"role": "assistant", "content": text}
        self._answer({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    def _answer(self, record: object) -> None:
        self._send(json.dumps(record).encode())

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _trickle(self, *, in_headers: bool) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Name: " if in_headers else b"HTTP/1.1 200 OK\r\n\r\n")
        while not self.server.ended.wait(0.02):
            self.wfile.write(b" ")

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def run_adversary(kind: str) -> Iterator[Adversary]:
    """Run a server in a thread while a block runs."""
    server = Adversary(kind)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    server = Adversary(sys.argv[1])
    print(server.server_port, flush=True)
    server.serve_forever()
