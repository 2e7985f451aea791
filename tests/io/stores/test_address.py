"""Addresses of folders in stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptkit.errors import CkptkitError, UnsupportedError, UsageError
from ckptkit.io.stores.address import Address, is_address, parse


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("s3://models/qwen/0.6b", Address("s3", "models", "qwen/0.6b")),
        ("s3://models/qwen/", Address("s3", "models", "qwen")),
        ("S3://models/a b", Address("s3", "models", "a b")),
        ("https://host/model", Address("https", "host", "model")),
        ("https://host:8443", Address("https", "host:8443", "")),
    ],
)
def test_reads(text: str, address: Address) -> None:
    assert is_address(text)
    assert parse(text) == address
    assert parse(str(address)) == address


def test_a_path_of_an_address_is_one() -> None:
    assert parse(Path("s3://models/qwen")) == parse("s3://models/qwen")


@pytest.mark.parametrize("text", ["models/qwen", "/s3://a/b", "org/model@v1", ".", "C:/x", "model:/x", ""])
def test_paths_are_none(text: str) -> None:
    assert not is_address(text)


@pytest.mark.parametrize("text", ["gs://models/a", "az://a/b", "hf://org/model", "http://host/model", "ftp://host/a"])
def test_other_stores_are_refused_by_name(text: str) -> None:
    assert is_address(text)
    with pytest.raises(UnsupportedError, match="no store"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3://models",
        "s3://models/",
        "s3:///a",
        "s3://UPPER/a",
        "s3://models/a/../b",
        "s3://models/a//b",
        "s3://models/./b",
        "s3://models/a\nb",
        "s3://models/" + "a" * 2000,
        "s3://models/a?versionId=1",
        "s3://models/a#b",
        "https://",
        "https://host:x/a",
        "https://host/a?token=1",
    ],
)
def test_bad_ones_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["s3://key:hidden@models/a", "https://me:hidden@host/a", "gs://me:hidden@b/a"])
def test_credentials_are_never_shown(text: str) -> None:
    with pytest.raises(CkptkitError) as caught:
        parse(text)
    assert "hidden" not in str(caught.value)


def test_names_inside() -> None:
    address = parse("s3://models/qwen")
    assert address.key("a/b.json") == "qwen/a/b.json"
    assert str(address.below("iter_1/")) == "s3://models/qwen/iter_1"
    assert parse("https://host").key("config.json") == "config.json"
