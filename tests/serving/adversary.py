"""A server that behaves as badly as it is told: `python adversary.py KIND` prints its port and serves.

Kinds: hanging, trickling (a byte now and then, for ever), trickling_headers, lying (no answer of ours), nonsense (no
JSON), refusing (status 500), slow (a right answer after 0.4 s), recovering (lies three times, then is right), right.
"""

import itertools
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KIND = sys.argv[1] if len(sys.argv) > 1 else "right"
QUESTIONS = itertools.count(1)
RIGHT = '{"button": "up", "reasoning": "", "context": ""}'


class Adversary(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
        number = next(QUESTIONS)
        if KIND == "hanging":
            time.sleep(600)
        elif KIND.startswith("trickling"):
            self._trickle(in_headers=KIND == "trickling_headers")
        elif KIND == "refusing":
            self.send_error(500, "out of memory")
        elif KIND == "nonsense":
            self._send(b"<html>it works</html>")
        elif KIND == "lying" or (KIND == "recovering" and number <= 3):
            self._say("I press up!")
        else:
            if KIND == "slow":
                time.sleep(0.4)
            self._say(RIGHT)

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
        while True:
            self.wfile.write(b" ")
            time.sleep(0.05)

    def log_message(self, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Adversary)
    print(server.server_port, flush=True)
    server.serve_forever()
