"""YAML files of the user: dataset descriptions and hyperparameters."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from yolov7_deploy.datasets.samples import short_text
from yolov7_deploy.sources.files import read_text

MAX_BYTES = 2**20
MAX_NODES = 50_000  # values in the file: PyYAML takes 0.1 ms and more for each
MAX_EXPANDED_NODES = 1_000_000  # with all aliases expanded; 16 characters of a text count as one more
MAX_NUMBER_CHARACTERS = 1_000  # reading `1:59:59...` takes quadratic time
_CHARACTERS_PER_NODE = 16
_TEXT = "tag:yaml.org,2002:str"
# Raised by PyYAML for a value that its tag does not fit, such as `!!float` without a number or `!!timestamp x`.
_CONSTRUCTION = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_yaml(path: Path, *, texts: Collection[str] = ()) -> object:
    """Return the document of a YAML file; only plain values, no Python objects.

    Args:
        path: The file.
        texts: Keys of the document below which everything is text: YAML reads `no` as False, and `007` as 7.

    Raises:
        OSError: The file cannot be read, or is too large.
        ValueError: It is not text, not valid YAML, or has too many or too long values; the message says where.
    """
    text = read_text(path, max_bytes=MAX_BYTES)
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root)
        _keep_texts(loader, root, texts)
        document: object = loader.construct_document(root)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(short_text(error)) from error
    except _TooLargeError:
        raise
    except _CONSTRUCTION as error:
        raise ValueError(f"a value does not fit its type ({type(error).__name__}: {short_text(error)})") from error
    return document


class _TooLargeError(ValueError):
    """A document has too many or too long values."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain values, with a limit for their number."""

    _count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - as in PyYAML
        self._count += 1
        if self._count > MAX_NODES:
            raise _TooLargeError(f"it has more than {MAX_NODES} values")
        return super().compose_node(parent, index)


def _keep_texts(loader: _Loader, root: yaml.Node, keys: Collection[str]) -> None:
    """Make all values below these keys of a mapping texts, as they are written; values with a tag keep it."""
    found = [value for key, value in root.value if key.value in keys] if isinstance(root, yaml.MappingNode) else []
    while found:
        node = found.pop()
        if isinstance(node, yaml.ScalarNode):
            untagged: str = loader.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
            node.tag = _TEXT if node.tag == untagged else node.tag
        else:
            found += [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]


def _check_size(root: yaml.Node) -> None:
    """Check the size of a document with all aliases expanded, so that a few lines cannot become gigabytes.

    Raises:
        _TooLargeError: The document or a number in it is too large, or an alias contains itself.
    """
    counts: dict[int, int] = {}
    being_counted: set[int] = set()

    def count(node: yaml.Node) -> int:
        if id(node) in being_counted:
            raise _TooLargeError("an alias contains itself")
        if id(node) not in counts:
            being_counted.add(id(node))
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            characters = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
            counts[id(node)] = 1 + characters // _CHARACTERS_PER_NODE + sum(map(count, parts))
            being_counted.remove(id(node))
        if counts[id(node)] > MAX_EXPANDED_NODES:
            raise _TooLargeError(f"its aliases expand to more than {MAX_EXPANDED_NODES} values")
        is_text = node.tag.endswith((":str", ":binary"))
        if isinstance(node, yaml.ScalarNode) and not is_text and len(node.value) > MAX_NUMBER_CHARACTERS:
            raise _TooLargeError(f"it has a number of {len(node.value)} characters")
        return counts[id(node)]

    count(root)
