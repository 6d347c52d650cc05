"""What the names and shapes of a prompt's tensors say: its virtual tokens at each place, and its geometry.

Legend: p virtual tokens, d embedding width, l layer, Hk key/value heads, Dk and Dv their widths.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import PromptRejected
from app.prompt import PromptKind, TaskType, TensorInfo
from app.sites import SIDES, Embedding, Site, parse_prefix_tensor
from app.strict_json import excerpt

_Infos = Mapping[str, TensorInfo]
_Sides = dict[str, tuple[int, ...]]  # by side: the shape
# The places of a prompt of each task type, by kind.
_EMBEDDINGS = {TaskType.CAUSAL_LM: (Embedding.DECODER,), TaskType.SEQ_2_SEQ_LM: tuple(Embedding)}
_SITES = {TaskType.CAUSAL_LM: (Site.DECODER_SELF,), TaskType.SEQ_2_SEQ_LM: tuple(Site)}


@dataclass(frozen=True, slots=True)
class PromptShape:
    """The shape of one prompt."""

    lengths: Mapping[Embedding | Site, int]  # p at each place that it has
    geometry: dict[str, object]  # JSON-able: goes into the metadata and the manifest

    @property
    def num_virtual_tokens(self) -> int:
        """Return p, the most of any place."""
        return max(self.lengths.values())

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return the possible positions of the decoder's first token after the prompt, the usual one last."""
        if Site.DECODER_SELF in self.lengths:
            return (0, self.lengths[Site.DECODER_SELF])
        return (self.lengths.get(Embedding.DECODER, 0),)

    @property
    def encoder_offset(self) -> int:
        """Return the position of the encoder's first token: a prefix there shifts none."""
        return self.lengths.get(Embedding.ENCODER, 0)


def prompt_shape(kind: PromptKind, task_type: TaskType, infos: _Infos) -> PromptShape:
    """Return the shape of these tensors. Raise PromptRejected unless they make a prompt of this kind."""
    for name, info in infos.items():
        if 0 in info.shape:
            raise PromptRejected("A tensor is empty", tensor=excerpt(name), found=str(list(info.shape)))
    return _soft_shape(task_type, infos) if kind is PromptKind.SOFT else _prefix_shape(task_type, infos)


def _soft_shape(task_type: TaskType, infos: _Infos) -> PromptShape:
    """Read tensors `[p, d]`: p is each place's own, d is one for all."""
    if not infos or not infos.keys() <= {*_EMBEDDINGS[task_type]}:
        raise _names_error(_EMBEDDINGS[task_type], infos)
    for name, info in infos.items():
        if len(info.shape) != 2:
            raise PromptRejected("A soft prompt is [p, hidden]", tensor=name, found=str(list(info.shape)))
    widths = {info.shape[1] for info in infos.values()}
    if len(widths) > 1:
        found = str(sorted(widths))
        raise PromptRejected("The rows of encoder and decoder differ in their width", found=found)
    lengths: dict[Embedding | Site, int] = {Embedding(name): info.shape[0] for name, info in infos.items()}
    (width,) = widths
    return PromptShape(lengths, {"hidden_size": width, "num_virtual_tokens": _in_json(task_type, lengths)})


def _prefix_shape(task_type: TaskType, infos: _Infos) -> PromptShape:
    """Read keys `[Hk, p, Dk]` and values `[Hk, p, Dv]`: p is one for all layers of a site."""
    sites = _by_layer(task_type, infos)
    lengths: dict[Embedding | Site, int] = {site: _length(site, layers) for site, layers in sites.items()}
    geometry = {
        str(site): {str(layer): _layer_shape(site, layer, sides) for layer, sides in layers.items()}
        for site, layers in sites.items()
    }
    layers = geometry[Site.DECODER_SELF] if task_type is TaskType.CAUSAL_LM else geometry
    return PromptShape(lengths, {"layers": layers, "num_virtual_tokens": _in_json(task_type, lengths)})


def _by_layer(task_type: TaskType, infos: _Infos) -> dict[Site, dict[int, _Sides]]:
    sites: dict[Site, dict[int, _Sides]] = {}
    for name, info in infos.items():
        parts = parse_prefix_tensor(name)
        if parts is None or parts.site not in _SITES[task_type]:
            expected = _prefix_names(task_type, "or")
            raise PromptRejected("Unexpected tensor", tensor=excerpt(name), expected=expected)
        if len(info.shape) != 3:
            raise PromptRejected("A prefix is [heads, p, width]", tensor=name, found=str(list(info.shape)))
        sites.setdefault(parts.site, {}).setdefault(parts.layer, {})[parts.side] = info.shape
    if not sites:
        raise PromptRejected("The file holds no tensors", expected=_prefix_names(task_type, "and"))
    return sites


def _prefix_names(task_type: TaskType, word: str) -> str:
    names = ", ".join(site.tensor("{layer}", "k") for site in _SITES[task_type])
    return f"{names} {word} .v, as it has the task_type {task_type}"


def _length(site: Site, layers: Mapping[int, _Sides]) -> int:
    lengths = {shape[1] for sides in layers.values() for shape in sides.values()}
    if len(lengths) > 1:
        found = f"{sorted(lengths)[:8]} at {site}"
        raise PromptRejected("Layers differ in their number of virtual tokens", found=found)
    (length,) = lengths
    return length


def _layer_shape(site: Site, layer: int, sides: _Sides) -> list[int]:
    """Return `[Hk, Dk, Dv]` of one layer."""
    key_name, value_name = (site.tensor(layer, side) for side in SIDES)
    if sides.keys() != {"k", "v"}:
        missing = value_name if "k" in sides else key_name
        raise PromptRejected("A layer needs both keys and values", tensor=missing, found="no such tensor")
    key, value = sides["k"], sides["v"]
    if key[0] != value[0]:
        expected, found = f"{key[0]} heads, as the keys have", str(value[0])
        raise PromptRejected("Values differ in heads", tensor=value_name, expected=expected, found=found)
    return [key[0], key[2], value[2]]


def _in_json(task_type: TaskType, lengths: Mapping[Embedding | Site, int]) -> object:
    """Return p: the number of a causal prompt's one place, or by place."""
    if task_type is TaskType.CAUSAL_LM:
        (length,) = lengths.values()
        return length
    return {str(place): length for place, length in lengths.items()}


def _names_error(places: tuple[Embedding, ...], infos: _Infos) -> PromptRejected:
    expected = f"exactly {places[0]}" if len(places) == 1 else f"{' or '.join(places)}, or both"
    found = ", ".join(excerpt(name) for name in list(infos)[:4]) or "no tensors"
    return PromptRejected("The file holds other tensors than it must", expected=expected, found=found)
