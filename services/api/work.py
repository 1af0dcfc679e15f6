"""From a request to an operation: one transaction, then the answer; never the broker."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Body, Header, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session

from services.api import examples, shapes
from services.api.problems import refusals
from services.api.waiting import shown
from shared import errors
from shared.commands import Command
from shared.database import transaction
from shared.operations.submit import submit

Made = TypeVar("Made")

NameOrId = Annotated[
    str, Path(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f]+$", description="an id or name")
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="the same key with the same request gives the same operation (E4)",
    ),
]


class RequestBody(BaseModel):
    """Strict: unknown fields are refused, and `"yes"` is no boolean."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text cannot hold the character NUL")
        return value


class NoOptions(RequestBody):
    """Nothing can be asked for here; the body may be left out."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})


Empty = Annotated[NoOptions, Body(default_factory=NoOptions)]


def accepted(*kinds: type[errors.TriptychError]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` of a route that starts long work."""
    return {
        202: {
            "description": "Accepted: the operation, queued",
            "headers": {
                "Location": {
                    "description": "where to follow it",
                    "schema": {"type": "string"},
                    "example": f"/v1/operations/{examples.OPERATION['id']}",
                }
            },
            "content": {"application/json": {"example": examples.OPERATION}},
        },
        **refusals(errors.IdempotencyKeyReused, *kinds),
    }


def command(kind: type[Command], **fields: Any) -> Command:
    """The typed command; what it refuses is the caller's 422."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(found) from error


def start(
    request: Request,
    response: Response,
    kind: type[Command],
    key: str | None = None,
    **fields: Any,
) -> shapes.Operation:
    """Submit the command and answer 202; its worker is woken from another thread."""
    wanted = command(kind, **fields)
    by: str = request.state.requested_by

    def submitted(session: Session) -> shapes.Operation:
        own_key = f"{by}:{key}" if key else None
        row = submit(session, wanted, requested_by=by, idempotency_key=own_key)
        return shown(session, [row])[0]

    operation = settled(submitted)
    request.app.state.relay.kick()
    response.headers["Location"] = f"/v1/operations/{operation.id}"
    return operation


def settled(change: Callable[[Session], Made]) -> Made:
    """Make a change in one transaction; where a unique index says that another request was
    first, once more: then the checks see that other one and say so."""
    try:
        with transaction() as session:
            return change(session)
    except IntegrityError:
        with transaction() as session:
            return change(session)
