"""Hooks of the site (mkdocs.yml): pages from files outside of docs/, and links to such files.

On GitHub the pages of docs/ link to `../SECURITY.md` or `../benchmarks/soak.py`. On the site, links to files that are
pages lead to these pages, and all others to the repository.
"""

from __future__ import annotations

import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/yolov7-deploy/yolov7-deploy"
# Files of the repository that are pages of the site.
PAGES = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "examples/README.md": "examples.md",
}
_LINK = re.compile(r"(!?\[)([^\]]*)(\]\()([^)\s]+)(\))")
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401 - types of mkdocs, which mypy does not check here
    """Add the pages that are files outside of docs/."""
    for source, page in PAGES.items():
        if page != "index.md":
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=with_links(text, folder=posixpath.dirname(source))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401
    """Translate the links of a page of docs/ to files outside of it."""
    return markdown if page.file.generated_by else with_links(markdown, folder="docs")


def with_links(markdown: str, *, folder: str) -> str:
    """Return Markdown whose relative links to files of the repository work on the site.

    Args:
        markdown: Text of a file of the repository; links inside blocks of code stay as they are.
        folder: Folder of that file, relative to the repository.
    """
    parts, start = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_translate(markdown[start : code.start()], folder), code[0]]
        start = code.end()
    return "".join([*parts, _translate(markdown[start:], folder)])


def _translate(text: str, folder: str) -> str:
    return _LINK.sub(lambda link: _translate_link(link, folder), text)


def _translate_link(link: re.Match[str], folder: str) -> str:
    target = site_link(link[4], folder=folder)
    page, name = target.partition("#")[0], posixpath.basename(link[4].partition("#")[0])
    text = page_title(page) if page and ":" not in page and posixpath.basename(link[2]) == name else link[2]
    return f"{link[1]}{text}{link[3]}{target}{link[5]}"


def page_title(page: str) -> str:
    """Return the title of a page, for links whose text is the name of its file."""
    source = next((name for name, other in PAGES.items() if other == page and page != "index.md"), f"docs/{page}")
    found = re.search(r"^# (.+)$", (ROOT / source).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else page


def site_link(target: str, *, folder: str) -> str:
    """Return the target of a link on the site: a page, or an address of the repository."""
    path, _, anchor = target.partition("#")
    if not path or ":" in path:
        return target
    name = posixpath.normpath(posixpath.join(folder, path))
    suffix = f"#{anchor}" if anchor else ""
    if name in PAGES:
        return f"{PAGES[name]}{suffix}"
    if name.startswith("docs/"):
        return f"{name.removeprefix('docs/')}{suffix}"
    kind = "tree" if (ROOT / name).is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{name}{suffix}"


class Reference(Extension):
    """Extension of griffe for the Python reference."""

    def on_object(self, *, obj: Any, **_: Any) -> None:  # noqa: ANN401
        """Make the section `Example:` of a docstring one of code, as `Examples:` is."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_function(self, *, func: Any, **_: Any) -> None:  # noqa: ANN401
        """Show values of defaults that are taken from the options of a command, as in `epochs: int = _TRAIN.epochs`."""
        for parameter in func.parameters:
            name, _, attribute = str(parameter.default).partition(".")
            if name.startswith("_") and attribute:
                options = getattr(importlib.import_module(func.module.path), name)
                parameter.default = repr(getattr(options, attribute))
