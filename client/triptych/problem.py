"""What can go wrong, as the API says it (RFC 9457) or in the same form when it cannot.

Every error this package raises on purpose is a `Problem`, so one `except` is enough.
"""

from typing import Any

import httpx

from triptych.types import Operation


class Problem(Exception):
    """The API refused a request.

    `status` is the HTTP status (0 when no answer came), `code` the stable word to branch
    on, `title` and `detail` sentences for people. `operation` and `conflict` name what is
    to blame, `errors` the request fields at fault, where the API says so.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int = 0,
        title: str | None = None,
        operation: Any = None,
        conflict: Any = None,
        errors: list[Any] | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.status = status
        self.title = title or code.replace("_", " ").capitalize()
        self.operation = operation
        self.conflict = conflict
        self.errors = errors or []

    @classmethod
    def from_response(cls, response: httpx.Response) -> "Problem":
        """Reads the problem out of an answer, also one that Triptych did not write."""
        try:
            document = response.json()
        except ValueError:
            document = None
        status = response.status_code
        if not isinstance(document, dict) or "code" not in document:
            return cls(
                "unexpected_answer",
                f"{response.request.url} answered {status} {response.reason_phrase} in a form "
                "that is not Triptych's. Check that the URL names the Triptych API.",
                status=status,
            )
        return cls(
            str(document["code"]),
            str(document.get("detail") or document.get("title") or response.reason_phrase),
            status=status,
            title=document.get("title"),
            operation=document.get("operation"),
            conflict=document.get("conflict"),
            errors=document.get("errors"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The problem document, without the fields that say nothing."""
        document: dict[str, Any] = {
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        for name in ("operation", "conflict", "errors"):
            if value := getattr(self, name):
                document[name] = value
        return document


class Unreachable(Problem):
    """No answer came from the API."""

    def __init__(self, url: str, cause: BaseException, *, operation: Any = None) -> None:
        super().__init__(
            "api_unreachable",
            f"Cannot reach the Triptych API at {url}: {_plain(cause)}. Check that it is "
            "running and that --url, TRIPTYCH_URL or `triptych login` names it.",
            title="API unreachable",
            operation=operation,
        )
        self.url = url


class NotConfigured(Problem):
    """The client does not know which API to talk to, or with which token."""


class OperationFailed(Problem):
    """An operation ended without success; `outcome` is the operation."""

    def __init__(self, outcome: Operation) -> None:
        error = outcome.get("error") or {}
        super().__init__(
            error.get("code") or outcome["state"],
            error.get("message") or f"Operation {outcome['id']} was {outcome['state']}.",
            title="Operation " + outcome["state"],
            operation=outcome["id"],
        )
        self.outcome = outcome


def _plain(cause: BaseException) -> str:
    """The transport's complaint in a few words."""
    text = str(cause)
    if "Connection refused" in text:
        return "connection refused, nothing listens there"
    if "Name or service not known" in text or "getaddrinfo" in text or "name resol" in text:
        return "the host name is not known"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its TLS certificate is not trusted (SSL_CERT_FILE names your own authority)"
    if isinstance(cause, httpx.TimeoutException):
        return "it did not answer in time"
    return text.rstrip(".") or type(cause).__name__
