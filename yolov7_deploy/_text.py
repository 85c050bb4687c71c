"""Foreign text in messages: file names, class names and addresses, made printable and without credentials.

Texts of models, datasets, libraries and users can have escape sequences that reprogram a terminal, bidirectional
overrides that reorder a line, surrogates that no encoding can write, and passwords.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import urllib.parse
from collections.abc import Collection, Iterable
from pathlib import Path

HIDDEN = "***"
MAX_FILES = 1000  # in a folder; `similar_file` ignores more
MIN_PREFIX = 3  # characters of a name of which another one is the beginning
MAX_NAME = 255  # characters of the name of a file
ALIKE = 0.75  # smallest ratio of difflib for similar names
MAX_REASON = 500  # characters of the message of a library
MAX_DECODING = 3  # a secret may be percent-encoded several times

_LINE_BREAKS = "\n\t"
# Control characters (C0, C1), surrogates, line separators, invisible characters and bidirectional controls.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
# The value of every name that ends with one of these is a secret: `pwd=`, `access_token=`, `X-Amz-Signature=`.
_SECRET = re.compile(
    r"(?:pass(?:w(?:or)?d|phrase|code)?|pwd|psw|pw|token|key|secret|sig|signature|auth|authorization|credentials?|sas)"
    r"\d*\s*=",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]{0,30}:/{1,3})(?P<rest>[^\s'\"<>]+)", re.IGNORECASE)
_WHOLE_ADDRESS = re.compile(r"(?P<scheme>(?:[a-z][a-z0-9+.-]*:/{1,3})?)(?P<rest>.+)", re.IGNORECASE | re.DOTALL)
_LOGIN_WITHOUT_SCHEME = re.compile(r"[^\s/@:]+:[^\s@]*@")
_FIELDS = re.compile(r"([&;?#\s'\"<>]+)")
_AT = re.compile(r"@|%40")
_LOGIN = re.compile(r"[:@]|%3a|%40", re.IGNORECASE)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return what to type instead of an unknown name: the known name that is most alike, and all of them.

    Example:
        >>> suggest("conf_thres", ["conf", "iou"])
        'Did you mean conf? One of: conf, iou'
    """
    names = list(known)
    alike = difflib.get_close_matches(name, names, n=1) or [
        one for one in names if len(one) >= MIN_PREFIX and (name.startswith(one) or one.startswith(name))
    ]
    return f"{f'Did you mean {alike[0]}? ' if alike else ''}One of: {', '.join(names)}"


def similar_file(path: Path, *, suffixes: Collection[str] | None = None) -> Path | None:
    """Return the existing file that was probably meant by a path with a typing error.

    It is one with the same stem, else one with a similar name; in the same folder (or, if that does not exist, the one
    above), else in the working directory, else the newest in `runs/*/*`. Of several, it is the name that is most
    alike, so that its suffix decides, too.

    Args:
        path: The path that does not exist.
        suffixes: Suffixes of the files to consider; `None` also considers folders.
    """
    if len(path.name) > MAX_NAME:  # comparing names takes the square of their length
        return None
    with contextlib.suppress(OSError, ValueError):  # a path may contain a null byte
        runs = sorted(Path().glob("runs/*/*/*"), key=lambda file: file.stat().st_mtime, reverse=True)
        folder = path.parent if path.parent.is_dir() else path.parent.parent
        for files in (_entries(folder), _entries(Path()), runs):
            known = [file for file in files if suffixes is None or file.suffix.lower() in suffixes]
            same = [file for file in known if file.stem.lower() == path.stem.lower()]
            alike = {file: _likeness(path.name, file.name) for file in same or known}
            best = max(alike, key=lambda file: alike[file], default=None)
            if best is not None and (same or alike[best] >= ALIKE):
                return best
    return None


def expand_user(path: str | Path) -> Path:
    """Expand `~` in a path; one with an unknown user, or that no file can have, is returned unchanged."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        return Path(path)


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError, ValueError):
        return [path for path in sorted(folder.iterdir())[:MAX_FILES] if not path.name.startswith(".")]
    return []


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def printable(text: object) -> str:
    r"""Return a text in which everything that is not for reading is an escape such as `\x1b` or `\u202e`.

    Line breaks and tabs are kept; `printable_line` escapes them, too. The result can be encoded as UTF-8.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in _LINE_BREAKS else _escape(found[0]), str(text))


def printable_line(text: object) -> str:
    r"""Return a text as one line: like `printable`, with line breaks and tabs as `\n` and `\t`."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def shorten(text: object, characters: int = MAX_REASON) -> str:
    """Return the beginning of a text: messages of libraries quote names and bytes of files, which may be long."""
    whole = str(text)
    return whole if len(whole) <= characters else f"{whole[:characters]}..."


def json_escape(text: str) -> str:
    """Return JSON with unprintable characters of strings as escapes; it parses to the same values."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode; names of files that are not UTF-8 have lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; its messages are printable, whatever names and texts they contain."""
    logger = logging.getLogger(name)
    logger.addFilter(_clean_record)
    return logger


def hide_credentials(address: str) -> str:
    """Return an address, or a text that has some, with all credentials as `***`: logins, and values such as `token=`.

    A login ends at the last `@`, since passwords may contain any character. Names and values may be percent-encoded.
    An unusual address may lose a harmless part.
    """
    is_address = _LOGIN_WITHOUT_SCHEME.match(address) or re.match(r"[a-z][a-z0-9+.-]*:/", address, re.IGNORECASE)
    pattern = _WHOLE_ADDRESS if is_address else _ADDRESS
    return _hide_fields(pattern.sub(_hide_login, address))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _clean_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _hide_login(address: re.Match[str]) -> str:
    rest = address["rest"]
    ends = [found.end() for found in _AT.finditer(rest)] if _LOGIN.search(re.split("[/?#]", rest)[0]) else []
    return address["scheme"] + (f"{HIDDEN}@{rest[ends[-1] :]}" if ends else rest)


def _hide_fields(text: str) -> str:
    return "".join(part if index % 2 else _hide_field(part) for index, part in enumerate(_FIELDS.split(text)))


def _hide_field(field: str) -> str:
    """Hide the value of a field `name=value` whose name is that of a secret; also in an address inside the value."""
    decoded = field
    for _ in range(MAX_DECODING):
        decoded = urllib.parse.unquote(decoded)
    found = _SECRET.search(decoded)
    if found:
        return decoded[: found.end()] + HIDDEN
    name, separator, value = decoded.partition("=")
    if separator and "://" in value and "@" in value:
        return name + separator + HIDDEN
    return field
