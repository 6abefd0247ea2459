"""What every test may use. No test touches the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers, a test oracle, is imported anywhere
# Before torch is: on a busy machine its OpenMP threads otherwise spend most of the time spinning for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's shared data (PENSTOCK_SHARED, or `shared` beside the repository); skips the test without it."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    directory = Path(os.environ.get("PENSTOCK_SHARED") or beside)
    if not (directory / "data").is_dir():
        pytest.skip("needs the shared data: neither PENSTOCK_SHARED nor `shared` beside the repository holds data/")
    return directory
