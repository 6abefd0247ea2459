"""The collector's thresholds while an engine runs."""

from __future__ import annotations

import gc

import pytest

from penstock.engine.garbage import THRESHOLDS, rare_collections


def test_thresholds_come_back_also_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(KeyError), rare_collections():
        assert gc.get_threshold() == THRESHOLDS
        raise KeyError
    assert gc.get_threshold() == before


def test_overlapping_users_restore_what_was_before_the_first() -> None:
    """Two engines in two threads leave in any order."""
    before = gc.get_threshold()
    one, other = rare_collections(), rare_collections()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold() == THRESHOLDS
    other.__exit__(None, None, None)
    assert gc.get_threshold() == before
