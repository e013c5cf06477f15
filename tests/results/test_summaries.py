"""Summaries: JSON is read as the types say, and what is of another type is named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from losscli.results.result import to_json
from losscli.results.summaries import CheckSummary, InspectionSummary, LineSummary, from_json

LINE: dict[str, Any] = {
    "command": "interpolate",
    "limit": None,
    "tf32": False,
    "except": ["*.bias"],
    "checkpoints": [{"name": "a", "path": None}],
    "splits": {
        "train": {
            "loss_a": 1.5,
            "minimum": None,
            "monotonic": None,
            "local_minima": [{"alpha": 0.5, "beyond_noise": True}],
            "not_finite": 3,
        }
    },
}


def test_values_of_the_right_type_are_read_and_written_again() -> None:
    assert from_json(LINE, LineSummary) == LINE
    assert to_json(from_json(json.loads(to_json(LINE)), LineSummary)) == to_json(LINE)
    assert from_json({}, LineSummary) == {}


def test_keys_that_a_type_does_not_have_are_left_out() -> None:
    assert from_json({"of a later version": [1], "seed": 1}, LineSummary) == {"seed": 1}
    assert from_json({"checkpoints": [{"metadata": {"a": [1]}}]}, InspectionSummary) == {
        "checkpoints": [{"metadata": {"a": [1]}}]
    }


def test_null_is_a_number_that_is_not_finite_or_none_where_that_is_known() -> None:
    read = from_json({"tolerance": None, "learning_rate": None, "escape": None}, CheckSummary)
    assert math.isnan(read["tolerance"])
    assert read["learning_rate"] is read["escape"] is None
    whole = from_json({"tolerance": 1}, CheckSummary)["tolerance"]
    assert (whole, type(whole)) == (1.0, float)


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        ((), [], "it is not an object"),
        (("command",), 3, "command is not text"),
        (("tf32",), 1, "tf32 is not true or false"),
        (("limit",), "x", "limit is not a whole number"),
        (("limit",), True, "limit is not a whole number"),
        (("except",), "x", "except is not a list"),
        (("except",), [None], "except[0] is not text"),
        (("checkpoints",), [[]], "checkpoints[0] is not an object"),
        (("checkpoints", 0, "path"), 1, "checkpoints[0].path is not text"),
        (("splits",), None, "splits is not an object"),
        (("splits", "train"), 1, "splits.train is not an object"),
        (("splits", "train", "loss_a"), "1", "splits.train.loss_a is not a number"),
        (("splits", "train", "loss_a"), True, "splits.train.loss_a is not a number"),
        (("splits", "train", "loss_a"), math.inf, "splits.train.loss_a is not a number"),
        (("splits", "train", "loss_a"), math.nan, "splits.train.loss_a is not a number"),
        (("splits", "train", "loss_a"), 10**400, "splits.train.loss_a is not a number"),
        (("splits", "train", "minimum"), [], "splits.train.minimum is not an object"),
        (("splits", "train", "not_finite"), 1.0, "splits.train.not_finite is not a whole number"),
        (("splits", "train", "local_minima"), {}, "splits.train.local_minima is not a list"),
        (
            ("splits", "train", "local_minima", 0, "beyond_noise"),
            None,
            "splits.train.local_minima[0].beyond_noise is not true or false",
        ),
    ],
)
def test_values_of_another_type_are_named(
    place: tuple[str | int, ...], value: object, text: str
) -> None:
    damaged = json.loads(json.dumps(LINE))
    inner = damaged
    for key in place[:-1]:
        inner = inner[key]
    if place:
        inner[place[-1]] = value
    with pytest.raises(ValueError, match=r".") as raised:
        from_json(damaged if place else value, LineSummary)
    assert str(raised.value) == text
