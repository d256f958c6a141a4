import hashlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pcam_jax.data.remote import RemoteFile, fetch_all
from pcam_jax.runtime.errors import Interrupted, UserError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
FILE = RemoteFile("a.bin", md5=(MD5,))


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT under every name, with the faults a test asks for."""

    daemon_threads = True
    cut_after: int = 0  # bytes of each answer after which the connection ends
    ranges = True
    content = CONTENT
    content_type = "application/octet-stream"
    statuses: list[int]
    asked: list[str]

    def handle_error(self, *_: object) -> None:
        """A client that goes away is part of some tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted or "all")
        if server.statuses:
            self.send_response(server.statuses.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        total = len(server.content)
        if start >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Type", server.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut_after] if server.cut_after else body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked, running.statuses = [], []
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


def fetch(server: Server, folder: Path, *files: RemoteFile, check=lambda: None) -> list[str]:
    told: list[str] = []
    address = f"http://127.0.0.1:{server.server_address[1]}"
    fetch_all(address, files or (FILE,), folder, check, told.append, wait_seconds=0.01)
    return told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once(server, tmp_path):
    assert fetch(server, tmp_path / "new") == ["a.bin: 3.0 MB, its MD5 is right."]
    assert (tmp_path / "new/a.bin").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["a.bin"]
    assert fetch(server, tmp_path / "new") == ["a.bin is there already."]
    assert server.asked == ["all"]


def test_cut_connections_are_taken_up_again(server, tmp_path):
    server.cut_after = 800_000
    fetch(server, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked == ["all", "bytes=800000-", "bytes=1600000-", "bytes=2400000-"]


def test_a_stopped_fetch_goes_on(server, tmp_path):
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        fetch(server, tmp_path, check=stop)
    have = (tmp_path / "a.bin.part").stat().st_size
    assert 0 < have < len(CONTENT)
    fetch(server, tmp_path)
    assert server.asked == ["all", f"bytes={have}-"]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_everything_again(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    server.ranges = False
    fetch(server, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_complete_part_and_one_too_long(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    fetch(server, tmp_path)
    (tmp_path / "b.bin.part").write_bytes(CONTENT + b"more")
    fetch(server, tmp_path, RemoteFile("b.bin", md5=(MD5,)))
    assert (tmp_path / "b.bin").read_bytes() == CONTENT


def test_wrong_bytes_are_refused_and_removed(server, tmp_path):
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(UserError, match=r"a\.bin was received wrong: .* MD5"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(UserError, match="3,000,000 bytes instead of 5"):
        fetch(server, tmp_path, RemoteFile("a.bin", size=5))
    (tmp_path / "a.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already with other content: delete it"):
        fetch(server, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_not_the_file(server, tmp_path, content_type):
    server.content, server.content_type = b"\n<!DOCTYPE html><html>quota exceeded", content_type
    with pytest.raises(UserError, match=r"web page \(HTML\)"):
        fetch(server, tmp_path)
    assert not (tmp_path / "a.bin").exists()


def test_busy_servers_are_asked_again_and_refusals_are_not(server, tmp_path):
    server.statuses = [503, 429]
    fetch(server, tmp_path)
    assert len(server.asked) == 3
    for status, said in ((404, "no such file"), (403, "refuses access"), (401, "login")):
        server.statuses, server.asked = [status], []
        with pytest.raises(UserError, match=said):
            fetch(server, tmp_path, RemoteFile("b.bin"))
        assert len(server.asked) == 1
    server.statuses = [503] * 20
    with pytest.raises(UserError, match=r"HTTP 503, 6 times.*goes on where it stopped"):
        fetch(server, tmp_path, RemoteFile("b.bin"))


def test_nobody_there(tmp_path):
    with pytest.raises(UserError, match="refused"):
        fetch_all("http://127.0.0.1:9", (FILE,), tmp_path, lambda: None, print, wait_seconds=0.001)


def test_space_is_looked_for_before_anything_is_fetched(server, tmp_path):
    with pytest.raises(UserError, match=r"need 9,000,000,000,\d+ MB but"):
        fetch(server, tmp_path, RemoteFile("a.bin", size=9 * 10**18))
    assert server.asked == []


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pcam_jax.download", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PATH": "", **environment}
    )


def test_the_verb_says_what_a_mirror_sends_wrong(server, tmp_path):
    done = run("pcam", tmp_path / "raw", "--mirror", f"http://127.0.0.1:{server.server_address[1]}/")
    assert done.returncode == 2
    assert "camelyonpatch_level_2_split_train_meta.csv was received wrong" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["kaggle", "idc", "isic"])
def test_the_verb_says_how_to_get_a_token(name, tmp_path):
    done = run(name, tmp_path / "raw", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "create a token" in done.stderr
    assert not (tmp_path / "raw").exists()
