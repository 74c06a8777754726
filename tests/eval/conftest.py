"""Fixtures of what `fakes` makes."""

from __future__ import annotations

import pytest

from mlpmem_eval.schema import Report

from .fakes import FakeClock, sample_report


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def report() -> Report:
    return sample_report()
