#!/usr/bin/env bash
# wandb 0.31.0. A run is logged online, its server goes away, and `wandb.finish` gives up after `finish_timeout`.
#
# Assumed: the run's folder is uploaded later with `wandb sync FOLDER`, as W&B's warning advises at that moment.
# Happens: `wandb sync FOLDER` passes over a folder that was logged online, also where it is the only argument, and exits
#     with 0. It has to be `wandb sync --no-skip-online FOLDER`.
#
# Output seen:
#     wandb: WARNING Fatal error while uploading data. Some run data will not be synced, but it will still be written to
#         disk. Use `wandb sync` at the end of the run to try uploading.
#     wandb: Skipped 1 online run(s). Include with --no-skip-online.
#     wandb: No runs to sync.
#     wandb: Would sync 1 run(s):
#
# Exits non-zero where it is otherwise.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet wandb==0.31.0
cd "$tmp"
export WANDB_API_KEY=$(printf 'k%.0s' {1..40}) WANDB_CONFIG_DIR=$tmp WANDB_CACHE_DIR=$tmp

cat >run.py <<'PYTHON'
import http.server, json, threading
import wandb

class Answer(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as lets a run begin."""
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        project = {"name": "p", "entity": {"name": "me"}}
        bucket = {"id": "1", "name": "abc", "displayName": "abc", "project": project}
        body = json.dumps({"data": {"upsertBucket": {"bucket": bucket}}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *message):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}"
run = wandb.init(project="p", id="abc", settings=wandb.Settings(base_url=url, finish_timeout=2))
server.shutdown()
server.server_close()
run.log({"loss": 1.0})
run.finish()
PYTHON
"$tmp/venv/bin/python" run.py 2>&1 | grep WARNING
"$tmp/venv/bin/wandb" sync --dry-run wandb/run-*-abc 2>&1 | tee plain
"$tmp/venv/bin/wandb" sync --dry-run --no-skip-online wandb/run-*-abc 2>&1 | tee included
grep -q "Skipped 1 online run" plain
grep -q "Would sync 1 run" included
