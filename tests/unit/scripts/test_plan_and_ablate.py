"""The pure parts of the planning script and of the ablations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import ablate  # noqa: E402
import plan  # noqa: E402

RUN = {"command": "ablate.py --x", "commit": "abc", "machine": {"cpu": "a processor", "cores": 2}}


def run_plan(monkeypatch: pytest.MonkeyPatch, *more: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--verify-ms", "5,0.1", "--draft-ms", "0.4", *more])
    return plan.parse_arguments()


def test_plan_predicts_every_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = run_plan(monkeypatch, "--batch", "1,2", "--max-k", "3", "--budgets", "4,8")
    rows = plan.predictions(args)
    assert len(rows) == 2 * (1 + 3 + 3 * 2)
    assert plan.best(rows, 1, "ssd")["tokens_per_second"] == max(
        row["tokens_per_second"] for row in rows if row["batch"] == 1 and row["method"] == "ssd"
    )
    plan.print_table(rows, [1, 2])
    plan.plot(rows, [1, 2], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,2,3", "1,-2"])
def test_plan_refuses_times_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        plan.parse_times(text)


def test_plan_takes_milliseconds() -> None:
    assert plan.parse_times("30") == (0.03, 0.0)
    assert plan.parse_times("5,0.1") == pytest.approx((0.005, 0.0001))


@pytest.mark.parametrize("name", ablate.FIGURES)
def test_a_figure_has_each_point_once(name: str) -> None:
    points = ablate.FIGURES[name]().points
    assert len({(point.series, point.x) for point in points}) == len(points)
    assert len({point.engine for point in points}) <= 8  # all are in memory together


def test_the_power_distribution_is_found_again() -> None:
    rows = [{"series": "a", "x": x, "hit_rate": 1 - 0.3 * x**-1.5} for x in (1, 2, 4, 8)]
    (fit,) = ablate.fit_power_distribution(rows).values()
    assert fit == pytest.approx({"miss": 0.3, "r": 1.5})


def test_a_figure_is_written_with_its_origin(tmp_path: Path) -> None:
    figure = ablate.FIGURES["fanout"]()
    rows: list[dict[str, Any]] = [
        {"series": point.series, "x": point.x, "hit_rate": 0.9 - 0.1 / point.x, "tokens_per_round": None}
        for point in figure.points
    ]
    ablate.write_table(tmp_path / "fanout.md", "fanout", figure, RUN, rows)
    ablate.plot(tmp_path / "fanout.png", figure, rows)
    text = (tmp_path / "fanout.md").read_text(encoding="utf-8")
    assert "ablate.py --x" in text
    assert "abc" in text
    assert "a processor" in text
    assert text.count("| temperature 0 |") == 5
    assert "F^-" in text
