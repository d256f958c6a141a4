from __future__ import annotations

import json
import signal

import pytest

from pcam_jax.runtime.errors import Interrupted, UserError, require


def test_require_gives_the_module() -> None:
    assert require("json", extra="none") is json


def test_require_names_package_and_extra() -> None:
    with pytest.raises(UserError, match=r"'no_such_package'.*pip install 'pcam-jax\[serve\]'"):
        require("no_such_package", extra="serve")


def test_an_interruption_carries_its_signal() -> None:
    assert Interrupted(signal.SIGINT, "saved").signum == signal.SIGINT
    assert str(Interrupted(signal.SIGINT, "saved")) == "saved"
