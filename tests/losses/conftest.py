"""Losses alone: seeded, without the clearing of models after each test, which takes longer than most of these tests."""

import keras
import pytest


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(7)
