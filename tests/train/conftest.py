"""A tiny bidirectional model, batches of list operations, and XLA's quick way of compiling."""

import jax
import pytest

from kvjax.data import ListOperations, batches
from kvjax.data.list_operations import EOS, MASK, VOCABULARY
from kvjax.models import Config, init

CONFIG = Config(
    len(VOCABULARY), 16, 24, 2, 2, 2, 8, tied=False, mask_token=MASK, eos=(EOS,), bidirectional=True
)
SOURCE = ListOperations(64, min_items=3, max_items=4)


@pytest.fixture(scope="session")
def tiny():
    return init(CONFIG, jax.random.key(0))


@pytest.fixture
def data():
    return iter(batches(SOURCE, 4, seed=0))
