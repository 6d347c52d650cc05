"""What weights rounded to 8 bits change: the same text before and after, at load.

V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.errors import UnsupportedModel
from app.models.backbones import AnyBackbone
from app.models.probe_sequences import ProbeSequence, ProbeSource, own_logits_of, packed_logits

# In nats: what the base itself would write becomes a tenth less probable a token, on average. Bases of whose
# activations few are very large, so that 8 bits leave nothing of the others, are far beyond it.
DIVERGENCE_BOUND = 0.1
_ROWS = 4  # decoded side by side
_TOKENS = 64  # of each
_TEXT = """The harbour was quiet when the first boats came in. Three people stood on the pier and counted
crates: twelve of herring, seven of mackerel, one of crabs. "Prices went up again," said the oldest of them,
"by about 4.5 % since March." Nobody answered. In 1987 the town had 3,200 inhabitants and two schools; today
a bus leaves every hour, and the library opens on Tuesdays. Mix 200 g of flour with an egg, salt and half a
litre of milk, and let it rest for twenty minutes before you bake it.
def mean(values): return sum(values) / len(values) if values else 0.0
Water boils at a lower temperature on a mountain because the pressure of the air is lower there. Please call
us back as soon as possible; our number is 555-0123. The committee agreed that the report should be
published, although several members had doubts. Le train part à huit heures. Der Zug fährt um acht Uhr ab.
"""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How far a base with rounded weights is from itself in bf16, over the positions of a text."""

    divergence: float  # mean Kullback-Leibler divergence of next tokens in nats, KL(bf16 || rounded)
    agreement: float  # share of positions at which the most probable token is the same
    positions: int

    def __str__(self) -> str:
        return (
            f"weights in int8 against bf16: next tokens diverge by {self.divergence:.1e} nats, and the most "
            f"probable one is the same at {self.agreement:.1%} of {self.positions} positions of a text"
        )


@dataclass(frozen=True, slots=True)
class OwnTexts:
    """Sequences of a text and the model's own logits `[n, V]` for each, before anything is rounded."""

    sequences: list[ProbeSequence]
    logits: list[Tensor]


@torch.inference_mode()
def own_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> OwnTexts:
    """Run a text through a model as it was loaded."""
    most = _ROWS * _TOKENS
    ids = tokenizer(_TEXT * 2, add_special_tokens=False, truncation=True, max_length=most)["input_ids"]
    rows = [torch.tensor(ids[begin : begin + _TOKENS]) for begin in range(0, most, _TOKENS)]
    sequences = [
        ProbeSequence(
            row, [1] * len(row), source=ProbeSource(row) if model.config.is_encoder_decoder else None
        )
        for row in rows
    ]
    return OwnTexts(sequences, [own_logits_of(model, sequence) for sequence in sequences])


@torch.inference_mode()
def compare_rounded(backbone: AnyBackbone, texts: OwnTexts) -> Rounding:
    """Compare a base with rounded weights with its own logits, decoding the text one token at a time.

    Raise UnsupportedModel: they are further apart than `DIVERGENCE_BOUND`, or NaN.
    """
    found = torch.cat(packed_logits(backbone, texts.sequences)).log_softmax(-1)
    own = torch.cat(texts.logits).log_softmax(-1)
    divergence = float(torch.nn.functional.kl_div(found, own, reduction="batchmean", log_target=True))
    agreement = float((found.argmax(-1) == own.argmax(-1)).float().mean())
    rounding = Rounding(divergence, agreement, len(own))
    if not divergence <= DIVERGENCE_BOUND:  # a NaN fails too
        raise UnsupportedModel(
            f"this '{backbone.geometry.architecture}' can't be served with --weights int8: {rounding} (at "
            f"most {DIVERGENCE_BOUND} nats are allowed); leave --weights away to serve it in bf16"
        )
    return rounding
