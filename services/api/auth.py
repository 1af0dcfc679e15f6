"""Who and what may come in: the gate before every route.

A middleware rather than a dependency, so that nothing of a stranger's request is parsed
and a route cannot forget it.
"""

import hmac

from fastapi import HTTPException
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.api.problems import RequestTooLarge, answer
from shared import errors
from shared.settings import settings

BOOTSTRAP = "token:bootstrap"
"""`requested_by` of whoever holds the token from the settings."""

bearer = HTTPBearer(auto_error=False, description="The token in TRIPTYCH_TOKEN of the API.")
"""Documents the scheme in OpenAPI; the gate enforces it."""


def configured_token() -> bytes:
    """The token to come in with. Raises SystemExit with a sentence when there is none."""
    token = settings().token
    if token is None or not token.get_secret_value().strip():
        raise SystemExit(
            "The API does not start without a token. Set TRIPTYCH_TOKEN, or TRIPTYCH_TOKEN_FILE "
            "to the path of a file that holds it; `openssl rand -hex 32` makes a good one."
        )
    return token.get_secret_value().encode()


GUARDED = ("/v1", "/metrics")
LARGEST_BODY = 64 * 1024


class Gate:
    """Lets in: to GUARDED with the right token only; no coded slash; no body over 64 KiB."""

    def __init__(self, app: ASGIApp, token: bytes) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(scope):
            await answer(refusal)(scope, receive, send)
        else:
            scope.setdefault("state", {})["requested_by"] = BOOTSTRAP
            await self._app(scope, _limited(receive), send)

    def _refusal(self, scope: Scope) -> errors.TriptychError | None:
        path, headers = scope["path"], dict(scope["headers"])
        guarded = any(path == each or path.startswith(f"{each}/") for each in GUARDED)
        if guarded and not self._known(headers):
            return errors.Unauthorized(
                "This needs the header `Authorization: Bearer …` with the API's token (the value "
                "of TRIPTYCH_TOKEN). None came, or another one."
            )
        # Decoded, `x%2Fsnapshot` would be another resource than the one that was named.
        if b"%2f" in scope.get("raw_path", b"").lower():
            return errors.NotFound("No id or name has a slash in it, so there is nothing here.")
        if int(headers.get(b"content-length", b"0")) > LARGEST_BODY:
            return RequestTooLarge("The body is larger than 64 KiB, which no request here needs.")
        return None

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


def _limited(receive: Receive) -> Receive:
    """The same for a body that does not say its length: read no more of it."""
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > LARGEST_BODY:
            raise HTTPException(413)
        return message

    return limited
