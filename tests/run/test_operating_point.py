"""What was chosen on validation survives the disk, and a damaged file is refused."""

import json

import pytest

from pcam_jax.metrics.recalibration import IsotonicMap
from pcam_jax.run.operating_point import FILE, OperatingPoint, read_operating_point, write_operating_point
from pcam_jax.runtime.errors import UserError


def test_defaults_where_nothing_was_chosen(tmp_path):
    assert read_operating_point(tmp_path) == OperatingPoint(
        temperature=1.0, threshold=0.5, criterion="default"
    )


def test_round_trip(tmp_path):
    point = OperatingPoint(1.7, 0.3, "youden", "a sentence", "d4", 120, IsotonicMap((0.1, 0.9), (0.0, 1.0)))
    write_operating_point(tmp_path, point)
    assert read_operating_point(tmp_path) == point


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0},
        {"temperature": "warm"},
        {"threshold": 2},
        {"colour": "red"},
        {"isotonic": {"knots": [0.1, 0.2], "values": [0.5]}},
        {"isotonic": {"knots": [0.1]}},
        {"isotonic": "yes"},
    ],
)
def test_a_damaged_file_is_said_to_be(tmp_path, change):
    write_operating_point(tmp_path, OperatingPoint())
    values = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(values | change))
    with pytest.raises(UserError, match="damaged"):
        read_operating_point(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 5000])
def test_what_is_no_object_is_damaged(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="damaged"):
        read_operating_point(tmp_path)
