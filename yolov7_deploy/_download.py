"""Bounded downloads over HTTP: size and time are limited, and redirects lead to HTTP addresses only."""

from __future__ import annotations

import base64
import contextlib
import errno
import math
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator
from typing import Any, NamedTuple

_BLOCK_BYTES = 2**18
_QUEUED_BLOCKS = 8

_HEAD_BYTES = 64
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"  # these are not percent-encoded

# A block and the size that the server announced (0 without one), an error, or the end.
_Message = tuple[bytes, int] | Exception | None


class IncompleteDownloadError(OSError):
    """The connection ended before all bytes that the server announced were received."""


class Answer(NamedTuple):
    """The first part of an answer: media type (`image/jpeg`), size in bytes if it is known, and the first bytes."""

    media_type: str
    length: int | None
    head: bytes


def download(
    address: str, *, max_bytes: int, timeout_s: float, min_bytes_per_s: float = math.inf
) -> Generator[tuple[bytes, int]]:
    """Yield the blocks of a download, each with the size that the server announced (0 without one).

    A thread reads, because a server that sends one byte every few seconds can delay every step (name, TLS, headers,
    content) for longer than the timeout of a socket. After an error the thread ends with its next byte or timeout.

    Args:
        address: An `http` or `https` address.
        max_bytes: Largest size.
        timeout_s: Seconds for the whole download, and for each wait for data.
        min_bytes_per_s: Slowest acceptable mean speed: every so many bytes extend the time by a second.

    Raises:
        TimeoutError: The download takes too long.
        IncompleteDownloadError: The content is incomplete.
        OSError: There is no connection, the server reports an error, or the content is too large. Also
            `http.client.HTTPException` and `ValueError` for a malformed address or answer.
    """
    messages: queue.Queue[_Message] = queue.Queue(maxsize=_QUEUED_BLOCKS)
    stopped = threading.Event()
    reader = threading.Thread(
        target=_read, args=(address, timeout_s, messages, stopped), name="y7-download", daemon=True
    )
    start, done, total = time.monotonic(), 0, 0
    reader.start()
    try:
        while True:
            allowed_s = timeout_s + done / min_bytes_per_s
            try:
                message = messages.get(timeout=max(0.0, start + allowed_s - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"timed out: {done} bytes came in {allowed_s:.3g} seconds"
                ) from None
            if isinstance(message, Exception):
                raise message
            if message is None:
                break
            block, total = message
            done += len(block)
            if max(done, total) > max_bytes:
                raise OSError(errno.EFBIG, f"it has {max(done, total)} bytes, more than {max_bytes}")
            yield block, total
    finally:
        stopped.set()
    if done < total:
        raise IncompleteDownloadError(errno.EIO, f"the connection stopped after {done} of {total} bytes")


def probe(address: str, *, timeout_s: float) -> Answer:
    """Return what a server sends for an address, without downloading it.

    Raises:
        TimeoutError: The answer takes too long.
        OSError: See `download`.
    """
    answers: queue.Queue[Answer | Exception] = queue.Queue()

    def ask() -> None:
        try:
            with _open(address, timeout_s) as response:
                media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                answers.put(Answer(media_type, response.length, response.read1(_HEAD_BYTES)))
        except Exception as error:  # noqa: BLE001 - the caller's thread raises it
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            answers.put(error)

    threading.Thread(target=ask, name="y7-probe", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {timeout_s:.3g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def ascii_address(address: str) -> str:
    """Return an HTTP address with spaces and other characters than ASCII encoded, as browsers send it.

    Raises:
        ValueError: The address is malformed, or no host can have this name.
    """
    if address.isascii() and " " not in address:
        return address
    parts = urllib.parse.urlsplit(address)
    login, at, host = parts.netloc.rpartition("@")
    encoded = (urllib.parse.quote(part, safe=_URL_CHARACTERS) for part in (login, *parts[2:]))
    login, path, query, fragment = encoded
    netloc = f"{login}{at}{host.encode('idna').decode()}"
    return urllib.parse.urlunsplit((parts.scheme, netloc, path, query, fragment))


def _open(address: str, timeout_s: float) -> Any:  # noqa: ANN401 - an HTTPResponse
    """Open an address; a login in it is sent as Basic authentication, but not to another host after a redirect."""
    address = ascii_address(address)
    parts = urllib.parse.urlsplit(address)
    login, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)) if at else address)
    if at:
        code = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {code}")
    return _opener().open(request, timeout=timeout_s)


def _read(address: str, timeout_s: float, messages: queue.Queue[_Message], stopped: threading.Event) -> None:
    def send(message: _Message) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return messages.put(message, timeout=0.1)

    try:
        with _open(address, timeout_s) as response:
            total = response.length or 0  # `None` without a valid Content-Length
            while not stopped.is_set() and (block := response.read1(_BLOCK_BYTES)):
                send((block, total))
    except Exception as error:  # noqa: BLE001 - the caller's thread raises it
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the open response, too
        send(error)
    else:
        send(None)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener without the handlers of `ftp:`, `file:` and `data:`, to which a server could redirect."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
