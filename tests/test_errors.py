"""One tree of errors: what the user can mend is an `MMLMError`."""

from __future__ import annotations

import pytest

from mmlm import errors


def _all() -> list[type[Exception]]:
    return [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]


@pytest.mark.parametrize("error", _all(), ids=lambda error: error.__name__)
def test_every_error_is_in_the_tree_and_in_its_picture(error):
    assert issubclass(error, errors.MMLMError)
    assert error.__name__ in (errors.__doc__ or "")


def test_a_missing_extra_names_the_package_and_the_command_that_brings_it():
    error = errors.MissingExtraError("flash_attn", needed_for="attention: flash", extra="flash")
    assert isinstance(error, ImportError)
    assert str(error) == (
        "attention: flash needs the package 'flash_attn', which is not installed. "
        "Install it with:  pip install 'mmlm[flash]'"
    )
