"""What the tests of downloads share."""

from pathlib import Path

import pytest

from fcvit_jax.errors import InputError


def anything(path: Path, name: str) -> None:
    """Accept any file."""


def refuse(text: str, call, *args, **kwargs) -> str:
    with pytest.raises(InputError, match=text) as caught:
        call(*args, **kwargs)
    assert str(caught.value).isprintable()
    return str(caught.value)
