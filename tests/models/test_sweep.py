"""Every causal architecture of transformers is exact or refused; none is wrong."""

import pytest

from tests.models.sweep import ARCHITECTURES, in_a_process


@pytest.mark.soak
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_is_exact_or_refused(architecture: str) -> None:
    verdict = in_a_process(architecture)
    assert verdict.kind != "wrong", verdict.detail
    assert "\n" not in verdict.detail
    assert len(verdict.detail) < 700
