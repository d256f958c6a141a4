"""A real service against those who mean no good: every bad request gets a 4xx and a sentence, and it lives on."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import picture_files
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kaggle_source import tif_bytes
from service import Reply, Service, form, read_reply, resident_bytes

from pcam_jax.web import api

GOOD = tif_bytes(np.full((12, 12, 3), 120, np.uint8))


@pytest.fixture(scope="module")
def service(tiny_run: Path) -> Iterator[Service]:
    with Service(tiny_run) as running:
        yield running
        assert running.predict([("still.tif", GOOD)]).status == 200
        assert running.stop() == 143
        # whatever was sent, the log holds no traceback
        assert {line.strip() for line in running.errors} <= {
            "WARNING:  Invalid HTTP request received.",
            "Stopped; all requests that were taken are answered.",
        }


def test_headers_fence_every_answer_in(service: Service) -> None:
    replies = [service.get(path) for path in ("/", "/docs", "/model", "/nothing", "/openapi.json")]
    replies += [
        service.predict([("a", GOOD)]),
        service.predict([("a", b"x")]),
        service.ask("PUT", "/predict"),
    ]
    for reply in replies:
        headers = reply.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert all(source.startswith("'sha256-") for source in policy["script-src"].split())
        assert all(source.startswith("'sha256-") for source in policy["style-src"].split())
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/examples/../../etc/passwd", 404),
        ("GET", "/examples/%2e%2e%2fsecret", 404),
        ("DELETE", "/predict", 405),
        ("POST", "/model", 405),
        ("POST", "/predict", 415),
        ("POST", "/predict?uncertainty=perhaps", 422),
    ],
)
def test_wrong_addresses_and_methods(service: Service, method: str, path: str, status: int) -> None:
    reply = service.ask(method, path)
    assert reply.status == status
    assert reply.error.endswith(".")


def test_head_is_get_without_the_body(service: Service) -> None:
    for path, status in (("/", 200), ("/healthz", 200), ("/nothing", 404), ("/predict", 405)):
        reply = service.ask("HEAD", path)
        assert (reply.status, reply.body) == (status, b"")
        assert "content-security-policy" in reply.headers


def test_too_much(service: Service) -> None:
    """Bombs of every kind; the answer comes, and the memory stays."""
    service.predict([("warm", GOOD)])
    before = resident_bytes(service.process.pid)
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(12):
            archive.writestr(f"{number}.png", bytes(31 * 2**20))
    refused: list[tuple[int, str, Reply]] = [
        (413, "unpacks to more than", service.predict([("bomb.zip", packed.getvalue())])),
        (422, "too large", service.predict([("giant.png", picture_files.giant_png())])),
        (413, "pixels", service.predict([("large.png", picture_files.giant_png(5000))])),
        (413, "tiles", service.predict([("wide.png", picture_files.giant_png(4000))])),
        (413, "more than 1,024 files", service.predict([("a", b"x")] * 1100)),
        (413, "pixels together", service.predict([("a", picture_files.giant_png(4000))] * 6)),
        (413, "larger than 64 MiB", service.predict([("a", bytes(70 * 2**20))])),
        (413, "larger than 32 MiB", service.predict([("a", bytes(33 * 2**20))])),
        (413, "patches", service.predict([("a", GOOD)] * 1000, "?uncertainty=true")),
        (413, "Heat maps", service.predict([("a", GOOD)] * 65, "?heat=true")),
    ]
    for status, words, reply in refused:
        assert (reply.status, words in reply.error) == (status, True), reply.body[:300]
    assert resident_bytes(service.process.pid) - before < 600 * 2**20


def test_a_body_without_a_length_is_counted(service: Service) -> None:
    body, kind = form([("a", bytes(66 * 2**20))])
    with contextlib.closing(service.connect()) as connection:
        parts = (body[start : start + 2**20] for start in range(0, len(body), 2**20))
        connection.request("POST", "/predict", parts, {"Content-Type": kind}, encode_chunked=True)
        reply = read_reply(connection)
    assert reply.status == 413
    assert "larger than 64 MiB" in reply.error


def test_those_who_leave_or_babble(service: Service) -> None:
    body, kind = form([("a", GOOD)])
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    for start in (head[:40].encode(), head.encode(), head.encode() + body[:100], head.encode() + body):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(start)
    for nonsense in (
        b"\x16\x03\x01" + bytes(50),
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
    ):
        with (
            socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection,
            contextlib.suppress(OSError),
        ):
            connection.sendall(nonsense)
            assert connection.recv(100).startswith(b"HTTP/1.1 4")
    assert service.get("/healthz").status == 200


def test_other_names_and_other_sites(service: Service) -> None:
    assert service.get("/model", Host="evil.example").status == 400
    assert service.get("/model", Host="localhost:1").status == 200
    reply = service.predict([("a", GOOD)], "", Sec_Fetch_Site="cross-site")
    assert reply.status == 403
    assert service.predict([("a", GOOD)], "", Sec_Fetch_Site="same-origin").status == 200


def test_names_in_answers_are_harmless(service: Service) -> None:
    reply = service.predict([("../../<script>\r\nX: y", GOOD), ("b", GOOD)])
    assert reply.status == 200
    name = reply.json["results"][0]["name"]
    assert "/" not in name
    assert name.isprintable()


def test_a_token_guards_all_but_the_page_and_the_probes(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("correct-horse-battery\n")
    with Service(
        tiny_run, "--token-file", tmp_path / "token", "--root-path", "/pcam", "--allow-host", "lab.example"
    ) as service:
        for path in ("/", "/healthz", "/readyz", "/pcam/", "/pcam/healthz"):
            assert service.get(path).status == 200, path
        right = "Bearer correct-horse-battery"
        for path in ("/model", "/metrics", "/docs", "/openapi.json", "/pcam/model", "/examples/x"):
            for wrong in (
                {},
                {"Authorization": "Bearer x"},
                {"Authorization": right + "y"},
                {"Authorization": right[7:]},
            ):
                reply = service.get(path, **wrong)
                assert (reply.status, reply.headers["www-authenticate"].startswith("Bearer")) == (
                    401,
                    True,
                ), path
        assert service.predict([("a", GOOD)]).status == 401
        assert service.predict([("a", GOOD)], Authorization=right).status == 200
        assert service.get("/pcam/model", Authorization=right, Host="lab.example").status == 200
        assert service.get("/openapi.json", Authorization=right).json["servers"] == [{"url": "/pcam"}]
        assert service.stop() == 143


def test_nothing_is_kept(tiny_run: Path, tmp_path: Path) -> None:
    """With a read-only run, in an empty folder, the service writes nothing anywhere near."""
    folder = tmp_path / "here"
    folder.mkdir()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with Service(tiny_run, cwd=folder, env={**os.environ, "TMPDIR": str(temporary)}) as service:
        large = picture_files.png(size=(48, 48))
        assert service.predict([("a", GOOD), ("b", large)] * 40, "?preview=true&heat=true").status == 200
        assert service.predict([("a", bytes(5 * 2**20))]).status == 415
        assert list(folder.iterdir()) == []
        assert list(temporary.iterdir()) == []
        assert service.stop() == 143


# ---------------------------------------------------------------- whatever the description allows, and a little more

_VALUES = st.one_of(st.sampled_from(["true", "false", "1", "0", ""]), st.text(max_size=8))
_FILES = st.one_of(
    st.just(GOOD),
    st.just(picture_files.png(size=(30, 20))),
    st.just(picture_files.jpeg(size=(12, 12))),
    st.binary(max_size=60),
    st.binary(max_size=40).map(lambda tail: GOOD[:-40] + tail),
)


def check_against_description(schema: dict[str, Any], path: str, method: str, reply: Reply) -> None:
    """The status is one that the description names, and the body is what it promises."""
    assert reply.status < 500 or reply.status == 503, reply.body
    operation = schema["paths"].get(path, {}).get(method.lower())
    if operation is None:
        assert reply.status in (404, 405, 401)
        api.Problem(**reply.json)
        return
    assert str(reply.status) in operation["responses"], (path, method, reply.status, reply.body[:200])
    for kind, content in operation["responses"][str(reply.status)].get("content", {}).items():
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        if kind == "application/json" and name:
            try:
                getattr(api, name)(**reply.json)
            except pydantic.ValidationError as error:
                raise AssertionError((path, method, reply.body)) from error


@given(
    st.lists(st.tuples(st.text(max_size=12), _FILES), max_size=4),
    st.dictionaries(st.sampled_from(["uncertainty", "heat", "preview", "other"]), _VALUES),
)
@settings(max_examples=80)
def test_predict_answers_as_described(
    service: Service, files: list[tuple[str, bytes]], query: dict[str, str]
) -> None:
    clean = [(name.encode("utf-8", "replace").decode(), content) for name, content in files]
    query = {name: value.encode("utf-8", "replace").decode() for name, value in query.items()}
    reply = service.predict(clean, f"?{urlencode(query)}")
    check_against_description(description(service), "/predict", "POST", reply)
    if reply.status == 200:
        assert len(reply.json["results"]) >= 1
        assert reply.json["failed"] == sum(
            result.get("error") is not None for result in reply.json["results"]
        )


@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
    st.integers(0, 6),
    st.binary(max_size=50),
    st.sampled_from(
        ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", ""]
    ),
)
@settings(max_examples=80)
def test_every_address_answers_as_described(
    service: Service, method: str, number: int, body: bytes, kind: str
) -> None:
    schema = description(service)
    path = sorted(schema["paths"])[number % len(schema["paths"])]
    reply = service.ask(method, path.replace("{name}", "none.png"), body, content_type=kind)
    check_against_description(schema, path, method, reply)


def test_schemathesis_finds_nothing(service: Service, tmp_path: Path) -> None:
    """All its checks, but that random bytes be taken for pictures and unknown parameters be refused."""
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    options = {
        "--checks": "all",
        "--exclude-checks": "positive_data_acceptance,negative_data_rejection",
        "--max-examples": "25",
        "--warnings": "off",
    }
    words = [word for pair in options.items() for word in pair]
    done = subprocess.run(
        [*command, *words, "--no-color", "--generation-deterministic", f"{service.address}/openapi.json"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* generated, [1-9]\d* passed", done.stdout), done.stdout


_DESCRIPTIONS: dict[int, dict[str, Any]] = {}


def description(service: Service) -> dict[str, Any]:
    """The OpenAPI description, read once."""
    if service.port not in _DESCRIPTIONS:
        _DESCRIPTIONS[service.port] = service.get("/openapi.json").json
    return _DESCRIPTIONS[service.port]
