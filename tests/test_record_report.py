"""The figures that a run keeps: last, best of the ensemble, and the best epoch of each classifier."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from record.logger import RunLog
from record.report import Reporter


def figures_of(acc1: list[float], ensemble: float, **extra: float) -> dict[str, Any]:
    return {"acc1": acc1, "ensemble_acc1": ensemble, "ensemble_acc5": 90.0, "extra": extra}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[int], Reporter]]:
    """Number of networks -> a reporter, whose log is closed afterwards."""
    logs = []

    def reporter_of(num_networks: int) -> Reporter:
        logs.append(RunLog(tmp_path, num_networks, active=True))
        return Reporter(logs[-1], epochs=3, steps_per_epoch=10, visible=False)

    yield reporter_of
    for log in logs:
        log.close()


def report(reporter: Reporter, epoch: int, **figures: dict[str, Any]) -> bool:
    return reporter.evaluation(figures, epoch=epoch, step=10 * epoch, rate=0.1, train={}, seconds=1.0)


def test_each_classifier_has_its_own_best_epoch(make: Callable[[int], Reporter]) -> None:
    reporter = make(2)
    assert report(reporter, 1, test=figures_of([50.0, 70.0], 80.0, exit=30.0))
    assert not report(reporter, 2, test=figures_of([60.0, 65.0], 75.0, exit=20.0))
    results = reporter.results()
    assert (results["acc1"], results["best_acc1"]) == ([60.0, 65.0], [50.0, 70.0])
    found = {name: (peak["epoch"], peak["acc1"]) for name, peak in results["own_best"].items()}
    assert found == {"1": (2, 60.0), "2": (1, 70.0), "exit": (1, 30.0)}
    assert (results["last"]["extra"], results["best"]["extra"]) == ({"exit": 20.0}, {"exit": 30.0})

    resumed = make(2)
    resumed.load_state_dict(reporter.state_dict())
    report(resumed, 3, test=figures_of([55.0, 71.0], 70.0, exit=25.0))
    found = {name: (peak["epoch"], peak["acc1"]) for name, peak in resumed.results()["own_best"].items()}
    assert found == {"1": (2, 60.0), "2": (3, 71.0), "exit": (1, 30.0)}


def test_the_best_epoch_is_chosen_on_held_out_images_where_there_are_some(make: Callable[[int], Reporter]) -> None:
    reporter = make(1)
    report(reporter, 1, val=figures_of([50.0], 50.0), test=figures_of([40.0], 40.0))
    report(reporter, 2, val=figures_of([49.0], 49.0), test=figures_of([45.0], 45.0))
    assert reporter.results()["own_best"] == {"1": {"epoch": 1, "acc1": 40.0, "criterion": 50.0}}
    assert (reporter.results()["best_chosen_on"], reporter.results()["reported_on"]) == ("val", "test")


def test_what_is_reported_is_called_by_its_name(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1, active=True)
    reporter = Reporter(log, epochs=3, steps_per_epoch=10, visible=False, reported="val")
    report(reporter, 1, val=figures_of([50.0], 50.0))
    results = reporter.results()
    assert (results["ensemble_acc1"], results["best_chosen_on"], results["reported_on"]) == (50.0, "val", "val")
    log.close()
