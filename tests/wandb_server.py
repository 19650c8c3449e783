"""A stand-in for Weights & Biases' server: it takes what W&B's client uploads and keeps the rows of each run."""

import contextlib
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any


class WandbServer(http.server.ThreadingHTTPServer):
    """`rows` are the history of each run, by its id, as the client sent it.

    `stop` makes the server go away; with `leaves_at_upload` it goes away when a run's rows arrive for the first time.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.leaves_at_upload = self.is_gone = False

    def stop(self) -> None:
        self.is_gone = True  # also on connections that are open
        self.shutdown()
        self.server_close()

    def handle_error(self, *request: object) -> None:
        """Report nothing: the client resets connections that it keeps, when it ends."""

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            run_id = path.split("/")[-2]
            if history := request.get("files", {}).get("wandb-history.jsonl"):
                offset, rows = history["offset"], [json.loads(line) for line in history["content"]]
                self.rows[run_id][offset : offset + len(rows)] = rows
            return {"limits": {}}
        query, variables = request.get("query", ""), request.get("variables", {})
        if "RunResumeStatus" in query:
            return {"data": {"model": {"bucket": self._describe(variables["name"])}}}
        if "UpsertBucket" in query:
            self.rows.setdefault(variables["name"], [])
            return {"data": {"upsertBucket": {"bucket": _bucket(variables["name"]), "inserted": True}}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}}
        if "viewer" in query.lower():
            return {"data": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}"}}}
        return {"data": {}}

    def _describe(self, run_id: str) -> dict[str, Any] | None:
        if run_id not in self.rows:
            return None
        rows = self.rows[run_id]
        return _bucket(run_id) | {
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
        }


def _bucket(run_id: str) -> dict[str, Any]:
    project = {"id": "p", "name": "pokegemma", "entity": {"id": "e", "name": "me"}}
    return {"id": "1", "name": run_id, "displayName": run_id, "project": project, "historyLineCount": 0}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.is_gone |= self.server.leaves_at_upload and self.path.endswith("/file_stream")
        if self.server.is_gone:
            self.close_connection = True
            return
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        is_json = self.headers["Content-Type"].startswith("application/json")  # telemetry is not
        self._reply(self.server.answer(self.path, json.loads(body)) if is_json and body else {})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply({})

    def do_GET(self) -> None:
        self._reply({})

    def _reply(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *message: object) -> None:
        pass


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Run a server while a block runs."""
    server = WandbServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.stop()
