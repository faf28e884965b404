"""What several files of tests stand on: a folder of their own, and a small checkpoint in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from commanding import saved


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def checkpoint(folder: Path) -> str:
    return saved(folder)
