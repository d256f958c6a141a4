"""The service: routes, what they promise, and the order in which a request is looked at.

Before a picture is decoded, a request has passed: the guard (host, token), readiness, room in the queue, its size,
the number of its files, what they are, and their pixels.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from pcam_jax.web import api
from pcam_jax.web.batching import Busy
from pcam_jax.web.guard import Guard
from pcam_jax.web.limits import Limits, Refusal
from pcam_jax.web.metrics import CONTENT_TYPE
from pcam_jax.web.model import ServedModel, Wanted
from pcam_jax.web.policy import content_security_policy
from pcam_jax.web.reference import reference_page
from pcam_jax.web.service import WARM_UP_SECONDS, ReadFiles, Service, too_busy
from pcam_jax.web.uploads import receive

PAGE = Path(__file__).with_name("page.html")
_DRAIN_SECONDS = 5.0
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": api.Problem, "description": "The request is damaged or holds no file."},
    401: {"model": api.Problem, "description": "The token is missing or wrong."},
    403: {"model": api.Problem, "description": "Sent by another web site."},
    408: {"model": api.Problem, "description": "The request arrived too slowly."},
    413: {"model": api.Problem, "description": "Too many bytes, files, pixels or tiles."},
    415: {"model": api.Problem, "description": "Not multipart/form-data, or a file of an unknown kind."},
    422: {"model": api.Problem, "description": "No picture can be used, or a parameter is wrong."},
    503: {"model": api.Problem, "description": "Warming up or busy: Retry-After says when to come back."},
}
_FILES = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "tif, png or jpeg, or zips of them; told apart by content.",
                        }
                    },
                }
            }
        },
    }
}


def create_app(
    service: Service, *, token: str = "", hosts: Sequence[str] = (), root_path: str = ""
) -> ASGIApp:
    """The ASGI application.

    Args:
        service: whose state may still be "warming up".
        token: that requests must bring, or "".
        hosts: names under which it may be asked; empty allows all.
        root_path: prefix under which a proxy offers it, such as "/pcam".
    """
    page = PAGE.read_text(encoding="utf-8")
    version = metadata.version("pcam-jax")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close, 30)

    app = FastAPI(
        title="pcam_jax",
        version=version,
        summary="Probabilities of patches of histopathology.",
        description=api.RESEARCH_USE,
        docs_url=None,  # its pages come from a content network
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_handlers(app)
    _add_interface(app, service, version)
    reference = reference_page(app.openapi())
    _add_pages(app, page, reference)
    return Guard(
        app,
        policy=content_security_policy(page, reference),
        metrics=service.metrics,
        paths=[
            "/",
            "/predict",
            "/healthz",
            "/readyz",
            "/metrics",
            "/model",
            "/docs",
            "/openapi.json",
        ],
        token=token,
        hosts=hosts,
        root_path=root_path,
    )


def _add_interface(app: FastAPI, service: Service, version: str) -> None:
    """The routes for programs, all of them in the OpenAPI description."""

    @app.post(
        "/predict",
        response_model=api.Predictions,
        responses=_PROBLEMS,
        openapi_extra=_FILES,
        summary="Probabilities of pictures",
    )
    async def predict(
        request: Request,
        uncertainty: Annotated[bool, Query(description="Look at each patch in all its symmetries.")] = False,
        heat: Annotated[bool, Query(description="Draw a heat map of each patch.")] = False,
        preview: Annotated[bool, Query(description="Return each picture as a PNG for a browser.")] = False,
    ) -> Response:
        wanted = Wanted(uncertainty, heat)
        try:
            return await _predict(service, request, wanted, preview)
        except Refusal:
            await _drain(request, service.limits)
            raise

    @app.get("/healthz", response_model=api.State, summary="Whether the service lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        response_model=api.State,
        responses={503: {"model": api.State}},
        summary="Whether it takes requests",
    )
    async def readyz() -> JSONResponse:
        ready = service.state == "ready"
        headers = {} if ready else {"Retry-After": str(WARM_UP_SECONDS)}
        return JSONResponse({"status": service.state}, 200 if ready else 503, headers)

    @app.get("/metrics", response_class=Response, summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/model", response_model=api.ModelFacts, summary="What is served")
    async def model() -> dict[str, Any]:
        return _facts(service, version)

    @app.get("/examples/{name}", responses={404: {"model": api.Problem}}, response_class=Response)
    async def example(name: str) -> Response:
        for picture in service.examples:
            if picture.name == name:
                return Response(picture.png, media_type="image/png")
        raise HTTPException(404, "There is no such example: GET /model lists them.")


def _add_pages(app: FastAPI, page: str, reference: str) -> None:
    """The routes for people: the page, and the description of the interface."""

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference)


async def _predict(service: Service, request: Request, wanted: Wanted, preview: bool) -> Response:
    if wanted.heat and not service.model.draws_heat:
        raise Refusal(422, "This exported model draws no heat maps: serve its run, or leave out heat=true.")
    service.check_open()
    length = _content_length(request)
    with service.holding(min(length, service.limits.body_bytes) if length is not None else 2**20):
        try:
            uploads = await receive(
                request.stream(), request.headers.get("content-type", ""), length, service.limits
            )
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; counted apart from our own failures
        started = time.monotonic()
        read = await service.read(uploads, wanted, preview)
        del uploads
        failed = len(read.results) - len(read.pictures)
        service.metrics.pictures.labels("refused").inc(failed)
        if not read.pictures:
            raise _none_usable(read)
        try:
            answers = iter(await service.model.answer(read.pictures, wanted))
        except Busy as busy:
            raise too_busy(busy.retry_after) from None
    service.metrics.pictures.labels("predicted").inc(len(read.pictures))
    results = [next(answers) if result is None else result for result in read.results]
    return JSONResponse(
        {
            "model": _name(service.model),
            "threshold": service.model.threshold,
            "seconds": round(time.monotonic() - started, 4),
            "failed": failed,
            "results": results,
            "notice": api.RESEARCH_USE,
        }
    )


def _none_usable(read: ReadFiles) -> Refusal:
    assert read.first_error is not None
    count = len(read.results)
    name = next(result["name"] for result in read.results if result is not None)
    if count == 1:
        return Refusal(read.first_error.status, f"{name}: {read.first_error.sentence}")
    return Refusal(
        422, f"None of the {count} pictures can be used; the first, {name}: {read.first_error.sentence}"
    )


def _content_length(request: Request) -> int | None:
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() else None


async def _drain(request: Request, limits: Limits) -> None:
    """Let the sender finish, within limits: most clients read no answer before they have sent all."""
    length = _content_length(request)
    if length is not None and length > 2 * limits.body_bytes:
        return
    received = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: all was read
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for piece in request.stream():
                received += len(piece)
                if received > 2 * limits.body_bytes:
                    return


def _facts(service: Service, version: str) -> dict[str, Any]:
    model, limits = service.model, service.limits
    views = 8 if model.image_shape[0] == model.image_shape[1] else 4
    return {
        "name": _name(model),
        "version": version,
        "class_names": list(model.class_names),
        "image_shape": list(model.image_shape),
        "resizes": model.intake.resize,
        "central_side": model.central_side,
        "threshold": model.threshold,
        "criterion": model.criterion,
        "meaning": model.meaning,
        "temperature": [one.operating_point.temperature for one in model.predictors],
        "tta": model.tta,
        "views": views * len(model.predictors),
        "heat_maps": model.draws_heat,
        "runs": model.facts,
        "remarks": model.remarks,
        "cards": model.cards,
        "limits": {**dataclasses.asdict(limits), "patches": model.capacity},
        "examples": [
            {
                "name": one.name,
                "address": f"examples/{one.name}",
                "label": one.label,
                "width": one.width,
                "height": one.height,
            }
            for one in service.examples
        ],
        "token_needed": service.token_needed,
        "notice": api.RESEARCH_USE,
    }


def _name(model: ServedModel) -> str:
    return " + ".join(model.names)


def _add_handlers(app: FastAPI) -> None:
    """Every answer that is no prediction is a status and a sentence."""

    async def refused(_: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
        return JSONResponse({"error": refusal.sentence}, refusal.status, headers)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return JSONResponse({"error": f"The parameter {name} is wrong: give true or false."}, 422)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = {
            404: "There is nothing here: see /docs for what can be asked.",
            405: f"{request.method} is not for this address: see /docs.",
        }
        sentence = error.detail if error.detail not in ("Not Found", "Method Not Allowed") else ""
        sentence = sentence or known.get(error.status_code, str(error.detail))
        return JSONResponse({"error": sentence}, error.status_code, error.headers)

    async def broken(_: Request, __: Exception) -> Response:
        return JSONResponse({"error": "The service failed at this request; its log says why."}, 500)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        Refusal: refused,
        RequestValidationError: invalid,
        HTTPException: unknown,
        Exception: broken,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
