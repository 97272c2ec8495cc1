"""From exceptions to answers: status codes and OpenAI's error format."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BackendError, CheckpointError, ConfigError, NumericalError, PromptError
from .schemas import ErrorBody, ErrorDetail

logger = logging.getLogger(__name__)
SHOWN = 3  # of the problems of one request


class ServeError(Exception):
    """An answer other than a picture."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        return ErrorBody(error=self.detail).model_dump()


def serve_error(error: Exception) -> ServeError:
    """The answer to an exception of a decode."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, PromptError):
        return ServeError(400, str(error), param="prompt", code="invalid_prompt")
    if isinstance(error, (ConfigError, CheckpointError)):
        return ServeError(400, str(error), code="invalid_option")
    if isinstance(error, NumericalError):
        return ServeError(500, str(error), kind="server_error", code="numerical_error")
    if isinstance(error, BackendError):
        return ServeError(503, str(error), kind="server_error", code="backend_error")
    logger.error("unexpected error", exc_info=error)
    return ServeError(
        500,
        f"the server failed on this request ({type(error).__name__}); its log says more, and it may be sent again",
        kind="server_error",
        code="internal_error",
    )


def request_error(problems: Sequence[Mapping[str, Any]]) -> ServeError:
    """The answer to a body that is not an ImageRequest, from pydantic's list of problems."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ServeError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json")
    fields = [".".join(str(part) for part in problem["loc"][1:2]) for problem in problems]
    texts = [
        f"{field or 'the body'}: {'unknown field' if problem['type'] == 'extra_forbidden' else problem['msg']}"
        for field, problem in zip(fields, problems)
    ]
    more = f" (and {len(texts) - SHOWN} more)" if len(texts) > SHOWN else ""
    return ServeError(400, "; ".join(texts[:SHOWN]) + more, param=fields[0] or None, code="invalid_request")
