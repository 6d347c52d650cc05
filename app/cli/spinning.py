"""How long the workers of torch's products wait for the next product before they sleep."""

from collections.abc import MutableMapping

SPINS = "GOMP_SPINCOUNT"
# Looks at the barrier, each with a pause of 10 to 50 ns. The gaps within a step, and from step to step, are
# shorter. GNU OpenMP's own 300,000 keep a core busy for up to 15 ms after a lone request's last step.
_COUNT = 5_000


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Bound it, unless the operator has said how workers wait; before torch is imported."""
    if not environment.keys() & {SPINS, "OMP_WAIT_POLICY"}:
        environment[SPINS] = str(_COUNT)
