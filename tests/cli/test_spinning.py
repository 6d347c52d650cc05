"""Workers' spinning is bounded, unless the operator has a wish of their own."""

import pytest

from app.cli.spinning import SPINS, bound_spinning


def test_it_is_bounded() -> None:
    environment = {"HOME": "/"}
    bound_spinning(environment)
    assert int(environment[SPINS]) > 0


@pytest.mark.parametrize("given", [{SPINS: "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_the_operators_wish_counts(given: dict[str, str]) -> None:
    environment = dict(given)
    bound_spinning(environment)
    assert environment == given
