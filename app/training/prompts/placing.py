"""At which attention sites a prefix goes, and whether positions count it."""

from collections.abc import Sequence

from app.errors import InvalidRequest
from app.sites import Site
from app.training.base import TrainingBase


def possible_sites(base: TrainingBase) -> tuple[Site, ...]:
    """Return the sites at which the base takes a prefix, none where it takes no prefix at all.

    Where scores get a bias by the distance of key and query (T5), keys before an encoder's tokens have none.
    """
    if not base.geometry.takes_prefixes:
        return ()
    without = _biased(base) - {Site.DECODER_SELF}
    return tuple(site for site in base.geometry.layers if site not in without)


def sites_of(wanted: Sequence[Site] | None, base: TrainingBase) -> tuple[Site, ...]:
    """Return the wanted sites, in the base's order; None: all. Raise InvalidRequest: it takes none there."""
    possible = possible_sites(base)
    if not possible:
        raise InvalidRequest(
            f"'{base.geometry.architecture}' keeps something else than keys and values of each head, so it "
            "takes no prefix; train a soft prompt (method 'prompt')",
            param="method",
        )
    if impossible := [site for site in wanted or () if site not in possible]:
        raise InvalidRequest(
            f"'{base.geometry.architecture}' takes prefixes at {', '.join(sorted(possible))}, not at "
            f"{', '.join(impossible)}",
            param="sites",
        )
    return tuple(site for site in possible if not wanted or site in wanted)


def is_shifted(base: TrainingBase, sites: Sequence[Site]) -> bool:
    """Return whether the decoder's positions count its prefix.

    They do where PEFT's do, in the decoder alone, and where scores get a bias by distance, which a key at no
    position lacks. Prefixes at several sites leave positions as they are, as those of Li and Liang do.
    """
    alone = tuple(sites) == (Site.DECODER_SELF,)
    return Site.DECODER_SELF in sites and (alone or Site.DECODER_SELF in _biased(base))


def _biased(base: TrainingBase) -> set[Site]:
    layers = base.geometry.layers
    return {site for site in layers if any(layer.has_position_bias for layer in layers[site])}
