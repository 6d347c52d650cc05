"""The places where a prompt reaches a model, and the names of its tensors in a canonical prompt file.

No other module spells these names (docs/formats.md). Legend: p virtual tokens, d embedding width, l layer,
Hk key/value heads, Dk and Dv their widths.
"""

import re
from enum import StrEnum
from typing import NamedTuple

SIDES = ("k", "v")  # keys and values


class Embedding(StrEnum):
    """Where input embeddings enter; the value names the tensor `[p, d]` of a soft prompt."""

    ENCODER = "enc.embeds"
    DECODER = "dec.embeds"


class Site(StrEnum):
    """One kind of attention layer; each has keys and values of its own in every layer of its stack."""

    ENCODER_SELF = "enc.self"
    DECODER_SELF = "dec.self"
    DECODER_CROSS = "dec.cross"

    def tensor(self, layer: int | str, side: str) -> str:
        """Return the name of a prefix tensor: keys (`k`) `[Hk, p, Dk]` or values (`v`) `[Hk, p, Dv]`."""
        return f"{self}.{layer}.{side}"


class PrefixTensor(NamedTuple):
    """The parts of a prefix tensor's name."""

    site: Site
    layer: int
    side: str


_PREFIX_TENSOR = re.compile(
    rf"({'|'.join(map(re.escape, Site))})\.(0|[1-9][0-9]{{0,3}})\.([{''.join(SIDES)}])"
)


def parse_prefix_tensor(name: str) -> PrefixTensor | None:
    """Return the parts of a prefix tensor's name; None for any other name."""
    match = _PREFIX_TENSOR.fullmatch(name)
    return PrefixTensor(Site(match[1]), int(match[2]), match[3]) if match else None
