"""A Hugging Face hub in miniature on this machine, for a client told of it by `HF_ENDPOINT`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Repositories = dict[str, dict[str, bytes]]


@contextmanager
def serve_hub(repositories: Repositories) -> Iterator[str]:
    """Serve files by repository and name; yields the endpoint. "gated/..." repositories refuse everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            parts = self.path.strip("/").split("?")[0].split("/")
            if parts[:2] == ["api", "models"]:
                repository, revision, file = "/".join(parts[2:4]), (parts[5:] or ["main"])[0], None
            elif parts[2:3] == ["resolve"]:
                repository, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            else:  # the client may ask for more than files
                return self.refuse(404, "EntryNotFound")
            files = repositories.get(repository)
            if files is None:
                return self.refuse(404, "RepoNotFound")
            if repository.startswith("gated/"):
                return self.refuse(403, "GatedRepo")
            if revision not in ("main", "v2", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if file is None:
                listing: object = {"id": repository, "sha": COMMIT}
                if parts[4:5] == ["tree"]:
                    listing = [
                        {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                        for name, content in files.items()
                    ]
                return self.send(json.dumps(listing).encode(), "application/json", with_body)
            if file not in files:
                return self.refuse(404, "EntryNotFound")
            return self.send(files[file], "application/octet-stream", with_body)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, content: bytes, kind: str, with_body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
