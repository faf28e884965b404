"""Stages report every step, with an estimate from the first one on."""

from __future__ import annotations

import pytest

from normsearch import Progress
from normsearch.progress import Stage


def test_a_stage_reports_its_start_and_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("normsearch.progress.time.monotonic", lambda: next(clock))
    seen: list[Progress] = []
    stage = Stage("fit", 4, seen.append)
    stage.advance("error 1")
    stage.advance("error 0.5")
    assert seen == [
        Progress("fit", 0, 4, None),
        Progress("fit", 1, 4, 6.0, "error 1"),
        Progress("fit", 2, 4, 4.0, "error 0.5"),
    ]


def test_a_stage_without_a_callback_counts_silently() -> None:
    Stage("fit", 1, None).advance()


def test_an_exception_of_the_callback_ends_the_work() -> None:
    def stop(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    stage = Stage("fit", 2, stop)
    with pytest.raises(KeyboardInterrupt):
        stage.advance()


def test_steps_of_an_earlier_run_count_but_tell_nothing_about_the_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("normsearch.progress.time.monotonic", lambda: next(clock))
    seen: list[Progress] = []
    Stage("fit", 10, seen.append, done=6).advance()
    assert seen == [Progress("fit", 6, 10, None), Progress("fit", 7, 10, 6.0)]


def test_without_a_total_nothing_is_estimated() -> None:
    seen: list[Progress] = []
    Stage("fit", 0, seen.append).advance()
    assert seen == [Progress("fit", 0, 0, None), Progress("fit", 1, 0, None)]
