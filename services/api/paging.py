"""Pages by keyset: an opaque cursor holds the last key, so that what is added or goes
between two requests neither repeats nor hides an item."""

import base64
import json
from typing import Any, Generic, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select
from sqlmodel import Session

from services.api.problems import FieldError, invalid

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """`next` is the `after` of the following page, null on the last one."""

    items: list[Item]
    next: str | None


class PageQuery(BaseModel):
    """Unknown query parameters are refused: a misspelt filter would return everything."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=1, le=200, description="how many items at most")
    after: str | None = Field(
        None, max_length=400, description="the `next` of the page before, as it was given"
    )


def fetch(
    session: Session, query: Select[Any], key: Any, asked: PageQuery, *, newest_first: bool = False
) -> tuple[list[Any], str | None]:
    """One page of rows ordered by the unique column `key`, and the cursor of the next one."""
    if asked.after is not None:
        last = _decode(asked.after, key)
        query = query.where(key < last if newest_first else key > last)
    query = query.order_by(key.desc() if newest_first else key).limit(asked.limit + 1)
    rows = list(session.scalars(query))
    if len(rows) <= asked.limit:
        return rows, None
    rows.pop()
    return rows, _encode(key, getattr(rows[-1], key.key))


def page(request: Request, response: Response, items: list[Item], cursor: str | None) -> Page[Item]:
    """The answer, with the address of the next page in `Link` (RFC 8288) too."""
    if cursor:
        following = request.url.include_query_params(after=cursor)
        response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return Page(items=items, next=cursor)


def _encode(key: Any, value: str | int) -> str:
    document = json.dumps([str(key), value]).encode()
    return base64.urlsafe_b64encode(document).rstrip(b"=").decode()


def _decode(cursor: str, key: Any) -> str | int:
    """Raises InvalidRequest for what this list did not give out."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        column, value = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (ValueError, TypeError):
        column = value = None
    expected = int if key.type.python_type is int else str
    if column != str(key) or type(value) is not expected or not _storable(value):
        raise invalid(
            [
                FieldError(
                    field="after",
                    message="this is not a cursor of this list; send the `next` of its last "
                    "page, or leave it out to begin at the start",
                )
            ]
        )
    return value


def _storable(value: str | int) -> bool:
    return "\0" not in value if isinstance(value, str) else abs(value) < 2**63
