"""Where the API is and which token opens it: arguments, environment, then the login file.

The login file is `$XDG_CONFIG_HOME/triptych/config.json`, mode 0600.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from triptych.problem import NotConfigured


@dataclass(frozen=True)
class Access:
    """An API's address and the token to send it (kept out of the repr)."""

    url: str
    token: str | None = field(default=None, repr=False)


def config_path() -> Path:
    """The login file's place; relative values of XDG_CONFIG_HOME are void, as its rules say."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    root = Path(base) if base.startswith("/") else Path.home() / ".config"
    return root / "triptych" / "config.json"


def find_access(url: str | None = None, token: str | None = None) -> Access:
    """Settles URL and token. Raises `NotConfigured` where no URL is to be found.

    The stored token goes to the stored URL only: naming another API never hands it over.
    """
    stored = _read_login()
    found = url or os.environ.get("TRIPTYCH_URL") or (stored.url if stored else None)
    if not found:
        raise NotConfigured(
            "not_configured",
            "No API address is known. Run `triptych login URL`, or set TRIPTYCH_URL.",
        )
    address = check_url(found)
    secret = token or _token_from_environment()
    if secret is None and stored and stored.url == address:
        secret = stored.token
    return Access(address, check_token(secret) if secret else None)


def check_url(url: str) -> str:
    """The URL without a trailing slash; raises `NotConfigured` unless it is HTTP(S)."""
    address = url.strip().rstrip("/")
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("http", "https") or not rest:
        raise NotConfigured(
            "url_invalid",
            f"{url!r} is no API address. Give it as http://host:port or https://host.",
        )
    return address


def check_token(token: str) -> str:
    """The token without surrounding white space; raises `NotConfigured` if no header holds it."""
    secret = token.strip()
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise NotConfigured(
            "token_invalid", "The token holds characters no token has. Copy it again, whole."
        )
    return secret


def save_login(access: Access) -> Path:
    """Writes the login file whole or not at all, readable by its owner only."""
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"url": access.url, "token": access.token}, file, indent=2)
        file.write("\n")
    partial.replace(path)
    return path


def _token_from_environment() -> str | None:
    if token := os.environ.get("TRIPTYCH_TOKEN"):
        return token
    name = os.environ.get("TRIPTYCH_TOKEN_FILE")
    if not name:
        return None
    try:
        token = Path(name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotConfigured(
            "token_file_unreadable",
            f"TRIPTYCH_TOKEN_FILE names {name}, which cannot be read: {error}.",
        ) from error
    return token or None


def _read_login() -> Access | None:
    path = config_path()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Access(str(document["url"]), document.get("token"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotConfigured(
            "login_file_unreadable",
            f"{path} cannot be read ({error}). Run `triptych login URL` to write it anew.",
        ) from error
