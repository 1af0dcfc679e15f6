"""Every refusal as an RFC 9457 problem: `application/problem+json` with a stable `code`.

`type` is `/problems/<code>`, which this API answers with what the code means. Nothing of
an unexpected error but a reference into the log reaches the caller.
"""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from shared import errors

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"


class MethodNotAllowed(errors.TriptychError):
    """That method does not apply here"""

    code = "method_not_allowed"
    status = 405


class RequestTooLarge(errors.TriptychError):
    """The request's body is too large"""

    code = "request_too_large"
    status = 413


class DatabaseUnavailable(errors.TriptychError):
    """The database does not answer"""

    code = "database_unavailable"
    status = 503


class FieldError(BaseModel):
    """One field at fault."""

    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details, plus `code` and what is to blame."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    operation: str | None = None
    conflict: str | None = None
    errors: list[FieldError] | None = None


EVERYWHERE = (
    errors.Unauthorized,
    errors.InvalidRequest,
    errors.TriptychError,
    DatabaseUnavailable,
)
"""What any route of /v1 may answer."""

_SAMPLES: dict[str, dict[str, Any]] = {
    "unauthorized": {"detail": "Send `Authorization: Bearer …` with the token of this API."},
    "invalid_request": {
        "detail": "Nothing was changed. `keep`: Input should be less than or equal to 50.",
        "errors": [{"field": "keep", "message": "Input should be less than or equal to 50"}],
    },
    "snapshot_exists": {
        "detail": "Server 'web-1' has a snapshot already; a server has at most one. Delete it, "
        "or ask with `replace: true`.",
        "conflict": "snp_01kayq3d9v0w2m8r5x7h1t4bcd",
    },
    "server_busy": {
        "detail": "An operation on server 'web-1' is running. Wait for its end or cancel it.",
        "operation": "op_01kayq4h2k8n3v6c9w5z0m7pqr",
    },
}


def document(error: errors.TriptychError) -> dict[str, Any]:
    return {
        "type": f"/problems/{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        **error.extra,
    }


def answer(error: errors.TriptychError, headers: dict[str, str] | None = None) -> JSONResponse:
    headers = dict(headers or {})
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="triptych"'
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "5"
    return JSONResponse(document(error), error.status, headers, MEDIA_TYPE)


def refusals(*kinds: type[errors.TriptychError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` of a route: what it may refuse with, by status and code."""
    by_status: dict[int | str, dict[str, type[errors.TriptychError]]] = {}
    every: tuple[type[errors.TriptychError], ...] = (*kinds, *EVERYWHERE)
    for kind in every:
        by_status.setdefault(kind.status, {})[kind.code] = kind
    return {
        status: {
            "description": ", ".join(f"`{code}`" for code in by_code),
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "examples": {code: _sample(kind) for code, kind in by_code.items()},
                }
            },
        }
        for status, by_code in by_status.items()
    }


def _sample(kind: type[errors.TriptychError]) -> dict[str, Any]:
    error = kind("")
    filled = {**document(error), "detail": f"{error.title}.", **_SAMPLES.get(kind.code, {})}
    return {"summary": error.title, "value": filled}


def catalogue() -> dict[str, type[errors.TriptychError]]:
    """Every kind of problem that there is, by its code."""

    def below(kind: type[errors.TriptychError]) -> Iterable[type[errors.TriptychError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    return {kind.code: kind for kind in reversed(list(below(errors.TriptychError)))}


def invalid(field_errors: list[FieldError]) -> errors.InvalidRequest:
    """The 422 that names each field at fault."""
    said = "; ".join(f"`{each.field}`: {each.message}" for each in field_errors)
    return errors.InvalidRequest(
        f"Nothing was changed. {said.rstrip('.')}. Correct that and send the request again.",
        errors=[each.model_dump() for each in field_errors],
    )


def _field_error(error: dict[str, Any]) -> FieldError:
    where, *path = error["loc"]
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "")
        return FieldError(field="body", message=f"the body is not valid JSON ({reason})")
    field = ".".join(map(str, path)) or str(where)
    if error["type"] == "extra_forbidden":
        return FieldError(field=field, message="there is no such field here; leave it out")
    if error["type"] == "missing":
        return FieldError(field=field, message="this field is required")
    if error["type"] == "model_attributes_type":
        message = "send a JSON object, with `Content-Type: application/json`"
        return FieldError(field=field, message=message)
    return FieldError(field=field, message=error["msg"].removeprefix("Value error, "))


def install(app: FastAPI) -> None:
    """Answer every exception in this form."""

    @app.exception_handler(errors.TriptychError)
    async def _triptych(request: Request, error: errors.TriptychError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(invalid([_field_error(each) for each in error.errors()]))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(_from_http(request, error), dict(error.headers or {}))

    async def _database(request: Request, error: Exception) -> JSONResponse:
        log.error("database.unavailable", path=request.url.path, reason=str(error))
        return answer(
            DatabaseUnavailable(
                "The database does not answer, so the request was not carried out as far as is "
                "known. Try again in a few seconds, with the same Idempotency-Key if it had one; "
                "/readyz says when the database is back."
            )
        )

    for kind in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(kind, _database)

    @app.exception_handler(IntegrityError)
    async def _race(request: Request, error: IntegrityError) -> JSONResponse:
        log.warning("request.raced", path=request.url.path, reason=str(error.orig))
        return answer(
            errors.Conflict(
                "Something of that name or kind exists already, or another request made it at the "
                "same moment. Nothing was changed; look at what there is, then ask again."
            )
        )

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        reference = uuid4().hex[:12]
        # The server logs the traceback, since Starlette raises the error again after this.
        log.error("request.crashed", path=request.url.path, reference=reference, error=repr(error))
        return answer(
            errors.TriptychError(
                "An unexpected error on the side of Triptych ended the request. The API's log has "
                f"the details under {reference}; please report it with these."
            )
        )


def _from_http(request: Request, error: HTTPException) -> errors.TriptychError:
    at = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return errors.NotFound(f"There is nothing at {at}. /docs lists every address.")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowed(f"{at} does not exist. /docs lists what this address can do.")
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return RequestTooLarge("The body is larger than 64 KiB, which no request here needs.")
    made = errors.InvalidRequest(f"The request could not be read: {error.detail}.")
    made.status = error.status_code
    return made
