"""Health for whatever runs the API, and the meaning of problem codes. Open to all."""

import structlog
from fastapi import APIRouter, Response
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from services.api import examples, shapes
from services.api.problems import catalogue, refusals
from shared import errors
from shared.broker import redis_client
from shared.database import reading
from shared.models import Operation

router = APIRouter(tags=["health"])
log = structlog.get_logger()


@router.get("/healthz", summary="Liveness", responses=examples.shown(examples.HEALTH) | refusals())
def healthz() -> shapes.Health:
    """The process lives and answers; it says nothing of what it depends on."""
    return shapes.Health(status="ok")


@router.get(
    "/readyz",
    summary="Readiness",
    responses=examples.shown(examples.READINESS)
    | refusals()
    | {
        503: {
            "description": "The database does not answer",
            "model": shapes.Health,
            "content": {"application/json": {"example": examples.UNREADY}},
        }
    },
)
def readyz(response: Response) -> shapes.Health:
    """Names what the API needs. 503 without the database; without the broker `degraded`,
    since requests are still accepted and their work starts when it is back."""
    checks = {"database": _database(), "broker": _broker()}
    states = [check.status for check in checks.values()]
    worst = next((state for state in ("failed", "degraded") if state in states), "ok")
    if worst == "failed":
        response.status_code = 503
    return shapes.Health(status=worst, checks=checks)


def _database() -> shapes.Check:
    try:
        with reading() as session:
            session.execute(select(Operation.id).limit(1))  # type: ignore[call-overload]
    except SQLAlchemyError as error:
        log.warning("readiness.database", reason=str(error))
        return shapes.Check(
            status="failed",
            reason="The database does not answer or its schema is not there yet; see the log.",
        )
    return shapes.Check(status="ok")


def _broker() -> shapes.Check:
    try:
        redis_client().ping()
    except (RedisError, OSError) as error:
        log.warning("readiness.broker", reason=str(error))
        return shapes.Check(
            status="degraded",
            reason="The broker does not answer. Requests are accepted; their work starts when it "
            "is back.",
        )
    return shapes.Check(status="ok")


@router.get(
    "/problems/{code}",
    summary="What a problem means",
    responses=examples.shown(examples.PROBLEM_KIND) | refusals(errors.NotFound),
)
def problem(code: str) -> shapes.ProblemKind:
    """The meaning of a problem's `type`: its title and the status it comes with."""
    kind = catalogue().get(code)
    if kind is None:
        raise errors.NotFound("No problem has this code. /docs names those of every request.")
    return shapes.ProblemKind(
        type=f"/problems/{code}", code=code, title=kind("").title, status=kind.status
    )
