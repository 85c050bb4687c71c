"""HTTP requests and answers of the application, without a web framework, and its web page."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yolov7_deploy._console import json_text
from yolov7_deploy._python_spelling import in_python
from yolov7_deploy._text import suggest
from yolov7_deploy.errors import DeviceError, ImageError, UsageError, Y7Error

ROUTES: dict[str, tuple[str, ...]] = {
    "/": ("GET", "HEAD"),
    "/model": ("GET", "HEAD"),
    "/healthz": ("GET", "HEAD"),
    "/detect": ("POST",),
}
PARAMETERS = ("conf", "iou", "max_det", "classes")
JSON, HTML = "application/json", "text/html; charset=utf-8"
PAGE = Path(__file__).with_name("page.html")  # with its styles and script; it loads nothing from anywhere
# The page may run its own script and styles, show images of the user, and call this server; nothing else.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
RETRY_AFTER_S = 1
_MAX_DIGITS = 15  # of a Content-Length
_FORM_FIX = "Send the bytes of the file alone:  curl --data-binary @image.jpg http://HOST:8000/detect"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: str
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestThresholds:
    """Thresholds of one request; `None` is the default of the application."""

    conf: float | None = None
    iou: float | None = None
    max_det: int | None = None
    classes: str | None = None


class HttpError(Exception):
    """An error of the request itself, with its status; its text and fix are those of `Y7Error`."""

    def __init__(self, status: int, message: str, *, fix: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.fix, self.headers = status, message, fix, dict(headers or {})


def check_route(method: str, path: str) -> None:
    """Check that the application has a page.

    Raises:
        HttpError: It does not exist (404), or takes other methods (405).
    """
    methods = ROUTES.get(path)
    if methods is None:
        raise HttpError(404, f"There is no page {path[:100]}.", fix=f"One of: {', '.join(ROUTES)}")
    if method not in methods:
        raise HttpError(
            405,
            f"{path} does not take {method[:20]}.",
            fix=f"Send {methods[0]}" + (" with the bytes of an image as the body." if path == "/detect" else "."),
            headers={"allow": ", ".join(methods)},
        )


def parse_thresholds(query: Sequence[tuple[str, str]]) -> RequestThresholds:
    """Return the thresholds in the query of an address, such as `conf=0.4&classes=person,dog`.

    Raises:
        HttpError: A parameter is unknown, repeated or not a number (400).
    """
    values: dict[str, Any] = {}
    for name, text in query:
        if name not in PARAMETERS:
            raise HttpError(400, f"There is no parameter {name[:40]!r}.", fix=suggest(name[:40], PARAMETERS))
        if name in values:
            raise HttpError(400, f"{name} is given twice.", fix=f"{name}={text[:40]}")
        values[name] = text if name == "classes" else _number(name, text)
    return RequestThresholds(**values)


def _number(name: str, text: str) -> float:
    try:
        return int(text) if name == "max_det" else float(text)
    except ValueError as error:
        whole = "a whole number" if name == "max_det" else "a number"
        example = f"{name}={100 if name == 'max_det' else 0.25}"
        raise HttpError(400, f"{name} must be {whole}, not {text[:40]!r}.", fix=f"For example: {example}") from error


async def read_body(headers: Mapping[str, str], parts: AsyncIterator[bytes], *, max_bytes: int) -> bytes:
    """Return the body of a request; one that is too large is not read to its end.

    Args:
        headers: The headers, by their names in lower case.
        parts: The body as it arrives.
        max_bytes: Maximum size.

    Raises:
        HttpError: The body is too large (413), a form (415), or empty (400).
    """
    if headers.get("content-type", "").lower().startswith("multipart/"):
        raise HttpError(415, "The body is a form, not an image.", fix=_FORM_FIX)
    length = headers.get("content-length", "")
    if length.isdecimal() and (len(length) > _MAX_DIGITS or int(length) > max_bytes):
        raise _too_large(max_bytes)
    body = bytearray()
    async for part in parts:
        body += part
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    if not body:
        raise HttpError(400, "The body is empty.", fix=_FORM_FIX)
    return bytes(body)


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(
        413,
        f"The body has more than {max_bytes / 1e6:g} MB.",
        fix="Send a smaller image, or start the server with a larger max_body_mb.",
        headers={"connection": "close"},
    )


def error_answer(error: HttpError | Y7Error) -> Answer:
    """Return the answer to a request that failed: 4xx if the request is wrong, 5xx if the server is."""
    if isinstance(error, HttpError):
        status, headers, message, fix = error.status, error.headers, error.message, error.fix
    else:
        status, headers, message, fix = _status(error), {}, in_python(error.message), in_python(error.fix)
    if status == 503:
        headers = {**headers, "retry-after": str(RETRY_AFTER_S)}
    return Answer(status=status, body=json_text({"error": message, "fix": fix}), headers=headers)


def _status(error: Y7Error) -> int:
    if isinstance(error, ImageError | UsageError):
        return 400
    return 503 if isinstance(error, DeviceError) else 500


def unavailable(reason: str) -> HttpError:
    """Return the error for a request that no replica can answer now."""
    return HttpError(503, reason, fix="Try again in a second.")


@functools.cache
def read_page() -> str:
    """Return the HTML of the web page."""
    return PAGE.read_text(encoding="utf-8")
