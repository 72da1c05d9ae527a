"""What a client is told when something goes wrong: OpenAI's error shape, and never a detail of the inside."""

from collections.abc import Mapping

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer other than success. param: the field at fault; code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict:
        """``{"error": {"message", "type", "param", "code"}}``"""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class QueueFull(ApiError):
    """Every slot is busy and as many requests wait as may. retry_after: seconds until it is worth trying again."""

    def __init__(self, retry_after: int):
        super().__init__(
            429,
            f"all slots are busy and the queue is full; try again in {retry_after} s",
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(retry_after)},
        )


class WorkerFailed(ApiError):
    """The decode thread has died; the reason is in the server's log."""

    def __init__(self):
        message = "the model stopped working; the server's log says why, and the server must be started again"
        super().__init__(500, message, kind="server_error", code="worker_failed")


class ShuttingDown(ApiError):
    """The server is being stopped."""

    def __init__(self):
        message = "the server is shutting down"
        super().__init__(503, message, kind="server_error", code="shutting_down", headers={"Retry-After": "5"})
