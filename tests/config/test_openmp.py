"""The variable is set where nobody has chosen, and left alone elsewhere."""

from __future__ import annotations

import pytest

from penstock.config.openmp import SPINS, bound_spinning


def test_spinning_is_bounded() -> None:
    environment = {"PATH": "/bin"}
    bound_spinning(environment)
    assert environment == {"PATH": "/bin", "GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_a_choice_is_kept(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    bound_spinning(environment)
    assert environment == chosen
