"""Searches in tests are short: what KerasTuner does between trials would take longer than they do."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _no_collecting(monkeypatch):
    """KerasTuner collects garbage twice before each trial: half a second in a process as large as that of the tests."""
    monkeypatch.setattr(gc, "collect", lambda *args: 0)
    for name in ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT"):
        monkeypatch.delenv(name, raising=False)  # with these a tuner would wait for a chief, for an hour
