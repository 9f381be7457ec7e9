"""Sizes in and out."""

import pytest

from meswitch.errors import ConfigError
from meswitch.units import format_bytes, parse_bytes, plural


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("1000", 1000), ("8GiB", 8 << 30), ("1.5 MB", 1_500_000), (" 2 KiB ", 2048), ("3B", 3)],
)
def test_sizes_are_read_in_decimal_and_binary_units(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "1 parsec", "1gb"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="is not a size; write it like 512MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2_064_981_296, "2.06 GB")])
def test_sizes_are_shown_with_three_digits(count, text):
    assert format_bytes(count) == text


def test_one_is_not_told_as_many():
    assert [plural(count, "bit") for count in (0, 1, 2, "some")] == ["0 bits", "1 bit", "2 bits", "some bits"]
