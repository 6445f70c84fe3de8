"""Configs are frozen and strict, say everything that is wrong at once, and read YAML 1.2."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from mmlm.config import Config, parse_yaml, read_yaml
from mmlm.errors import ConfigError


class Row(Config):
    """A row."""

    row_tokens: int = Field(default=4096, ge=128)
    """Length of a row."""

    rates: tuple[float, ...] = ()
    """Some rates."""


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        Row.from_dict({"row_tokens": 64, "open_row": 1}, origin="a.yaml")
    message = str(caught.value)
    assert message.startswith("a.yaml is not a valid Row:")
    assert "row_tokens: input should be greater than or equal to 128 (got 64)" in message
    assert "open_row: no such key" in message


def test_a_number_in_quotes_is_not_a_number():
    with pytest.raises(ConfigError, match=r"row_tokens: input should be a valid integer"):
        Row.from_dict({"row_tokens": "4096"})


def test_a_value_that_is_not_plain_is_refused():
    with pytest.raises(ConfigError, match="not plain YAML"):
        Row.from_dict({"rates": {1, 2}})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Row().row_tokens = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_docstrings_of_fields_become_their_descriptions():
    assert Row.model_fields["row_tokens"].description == "Length of a row."


@given(st.integers(128, 10**9), st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_a_config_survives_its_plain_values(row_tokens, rates):
    config = Row(row_tokens=row_tokens, rates=tuple(rates))
    assert Row.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1.0e-3", 1e-3),
        ("558_000", 558_000),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        (".5", 0.5),
        ("1:30", "1:30"),
        ("010", "010"),
        ("2026-11-21", "2026-11-21"),
        ("0", 0),
        ("-3", -3),
        ("0x1F", 31),
        ("null", None),
    ],
)
def test_yaml_means_what_people_expect(text, value):
    assert parse_yaml(text, origin="t") == value
    assert type(parse_yaml(text, origin="t")) is type(value)


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(ConfigError, match="the key 'a' stands twice"):
        parse_yaml("a: 1\na: 2", origin="t")


def test_broken_yaml_is_told_with_its_line():
    with pytest.raises(ConfigError, match=r"t is not valid YAML: [\s\S]*line 2"):
        parse_yaml("a: 1\nb: [", origin="t")


def test_a_tag_that_would_run_code_is_refused():
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        parse_yaml("!!python/object/apply:os.system ['true']", origin="t")


def test_a_missing_file_is_told_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read"):
        read_yaml(tmp_path / "nothing.yaml")


def test_a_file_that_is_not_text_is_told_with_its_name(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"a\.yaml cannot be read"):
        read_yaml(tmp_path / "a.yaml")
