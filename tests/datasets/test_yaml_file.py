"""YAML files: values that do not fit their tags, and files that would take too long, are errors with a reason."""

import itertools

import pytest

from yolov7_deploy.datasets import open_dataset, yaml_file
from yolov7_deploy.datasets.yaml_file import MAX_BYTES, read_yaml
from yolov7_deploy.errors import DatasetError

TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "omap", "pairs", "set", "str", "seq", "map", "merge")
VALUES = ("", "x", "''", "-", "+", "[]", "{}", "[x]", "2001-99-99", "0x", "0b", "1:x", "1e", "_", ".", "9" * 400)


@pytest.mark.parametrize("tag", [*(f"!!{tag}" for tag in TAGS), "!!python/name:os.system", "!own", "!"])
def test_a_value_that_does_not_fit_its_tag_is_a_value_error(tmp_path, tag):
    path = tmp_path / "a.yaml"
    for value, template in itertools.product(VALUES, ("a: {}", "? {}\n: 1", "a: [1, {}]", "{}")):
        path.write_text(template.format(f"{tag} {value}"))
        try:
            read_yaml(path)
        except ValueError as error:
            assert str(error)


@pytest.mark.parametrize("value", ["!!float", "!!int", "!!timestamp", "!!timestamp x", "!!bool x", "!!int ''"])
@pytest.mark.parametrize("key", ["val", "nc", "names", "path", "unused"])
def test_a_value_that_does_not_fit_its_tag_is_a_dataset_error(tmp_path, key, value):
    path = tmp_path / "data.yaml"
    path.write_text(f"{key}: {value}\n")
    with pytest.raises(DatasetError, match=r"data\.yaml cannot be read as YAML") as caught:
        open_dataset(path)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#" * (MAX_BYTES + 1), "more than"),
        ("a: [" + "1," * 60 + "]", "more than 50 values"),
        ("- &a 1\n" + "- *a\n" * 60, "more than 50 values"),
        ("a: 1" + ":59" * 3_000, "a number of 9001 characters"),
        ("a: !!int '" + "1:" * 1000 + "'", "a number of 2000 characters"),
        ("&a [*a]", "contains itself"),
    ],
    ids=["bytes", "values", "aliases", "number", "tag", "itself"],
)
def test_a_file_that_would_take_too_long_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(yaml_file, "MAX_NODES", 50)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises((OSError, ValueError), match=message):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_and_utf_16_are_read(tmp_path, encoding):
    (tmp_path / "a.yaml").write_text("names: [Löwe]\n", encoding=encoding)
    assert read_yaml(tmp_path / "a.yaml") == {"names": ["Löwe"]}


def test_a_file_without_a_document_is_none(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "a.yaml") is None
