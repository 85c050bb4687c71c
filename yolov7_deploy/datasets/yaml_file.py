"""YAML files of the user: dataset descriptions and hyperparameters."""

from __future__ import annotations

from pathlib import Path

import yaml

from yolov7_deploy.datasets.samples import short_text
from yolov7_deploy.sources.files import read_text

MAX_BYTES = 2**20  # PyYAML parses about 100 kB per second
MAX_NODES = 1_000_000  # of a document with its aliases expanded
# Raised by PyYAML for a value that its tag does not fit, such as `!!float` without a number or `!!timestamp x`.
_CONSTRUCTION = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_yaml(path: Path) -> object:
    """Return the document of a YAML file; only plain values, no Python objects.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not text, too large, too deep, or not valid YAML; the message says where.
    """
    text = read_text(path, max_bytes=MAX_BYTES)
    try:
        _count_nodes(yaml.compose(text, yaml.SafeLoader))
        document: object = yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(short_text(error)) from error
    except _CONSTRUCTION as error:
        raise ValueError(f"a value does not fit its type ({type(error).__name__}: {short_text(error)})") from error
    return document


def _count_nodes(root: yaml.Node | None) -> int:
    """Return the size of a document with all aliases expanded, so that a few lines cannot become gigabytes.

    Raises:
        ValueError: The document is too large for a dataset YAML, or contains itself.
    """
    counts: dict[int, int] = {}
    being_counted: set[int] = set()

    def count(node: yaml.Node) -> int:
        if id(node) in being_counted:
            raise ValueError("an alias contains itself")
        if id(node) not in counts:
            being_counted.add(id(node))
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            counts[id(node)] = 1 + sum(map(count, parts))
            being_counted.remove(id(node))
        if counts[id(node)] > MAX_NODES:
            raise ValueError(f"its aliases expand to more than {MAX_NODES} entries")
        return counts[id(node)]

    return count(root) if root is not None else 0
