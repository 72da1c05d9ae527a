"""The web application: every endpoint behind one guard, and every error in OpenAI's shape."""

import contextlib
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from nanochat_jax.serve import openai, page, responses, schemas, tokenize
from nanochat_jax.serve import prometheus as exposition
from nanochat_jax.serve.api_errors import ApiError
from nanochat_jax.serve.explain import explain
from nanochat_jax.serve.ignored import IgnoredFields
from nanochat_jax.serve.security import TOO_LARGE, Guard
from nanochat_jax.serve.worker import Worker

logger = logging.getLogger(__name__)


def create_app(
    worker: Worker, api_key: str | None = None, allow_origin: str | None = None, strict: bool = False
) -> FastAPI:
    """The application of one served model. Its lifespan starts and stops the worker.

    api_key None: no key is needed, and requests must be addressed to this machine (see `security`). strict: fields that
    the server knows nothing of are refused instead of ignored.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        worker.start()
        yield
        worker.stop()

    app = FastAPI(
        title="nanochat_jax",
        description="A language model trained with nanochat_jax, behind an OpenAI-compatible API.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.worker, app.state.ignored = worker, IgnoredFields(strict)
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.Error, "description": text}
        for status, text in {401: "no or a wrong API key", 403: "another host or web site", 413: "too long"}.items()
    }
    for module in openai, responses, tokenize:
        app.include_router(module.router, responses=refused)
    html, policy = page.load()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": policy})

    @app.get(
        "/health",
        response_model=schemas.Health,
        responses={503: {"model": schemas.Health, "description": "warming up, or the decode thread failed"}, **refused},
    )
    async def health() -> Response:
        """Whether the server works; answered at once whatever the model is doing."""
        slots, running, ready = worker.engine.slots, worker.running, worker.ready
        state = {
            "status": "ok" if ready else "warming up" if worker.healthy else "error",
            "ready": ready,
            "warmed_up": round(worker.warmed_up, 3),
            "num_gpus": len(worker.devices),
            "available_workers": slots - running,
            "model": worker.model.name,
            "step": worker.model.step,
            "running": running,
            "waiting": worker.waiting,
        }
        return JSONResponse(state, 200 if ready else 503)

    @app.get("/stats", response_model=schemas.Stats, responses=refused)
    async def stats() -> dict:
        """The slots, which the reference calls workers."""
        slots, running, devices = worker.engine.slots, worker.running, worker.devices
        per_device = slots // len(devices)
        return {
            "total_workers": slots,
            "available_workers": slots - running,
            "busy_workers": running,
            "workers": [{"gpu_id": i // per_device, "device": devices[i // per_device]} for i in range(slots)],
        }

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refused},
    )
    async def prometheus() -> Response:
        """Counts for Prometheus."""
        return Response(worker.metrics.text(), headers={"Content-Type": exposition.CONTENT_TYPE})

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return explain(error.errors(), error.body).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {
            400: "the body is no JSON that can be read: it is not UTF-8, too deep, or holds too long a number",
            404: "there is nothing at this address",
            405: "this address does not take this method",
        }
        text = message.get(error.status_code, str(error.detail))
        code = TOO_LARGE if error.status_code == 413 else None
        return ApiError(error.status_code, text, code=code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error; the server's log says more", kind="server_error").response()

    app.add_middleware(Guard, key=api_key, allow_origin=allow_origin, count=worker.metrics.request)
    return app
