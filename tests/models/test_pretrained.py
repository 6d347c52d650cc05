"""A plain model, as training takes it: its own attention, frozen, and open to gradients of its inputs."""

from pathlib import Path

import torch

from app.models.loading import load_base
from app.models.pretrained import load_pretrained, read_config
from tests.tiny_models import VOCABULARY, tiny_model


def test_a_pretrained_model_is_the_saved_one_and_frozen(saved_llama: Path) -> None:
    reference = str(saved_llama)
    loaded = load_pretrained(
        reference,
        read_config(reference),
        dtype=torch.float32,
        device=torch.device("cpu"),
        progress=lambda _: None,
    )
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded.model(ids).logits, tiny_model("llama")(ids).logits)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    soft = torch.zeros(1, 3, 48, requires_grad=True)
    loaded.model(inputs_embeds=soft).logits.sum().backward()
    assert soft.grad is not None
    assert loaded.eos_ids == {VOCABULARY - 1}
    served = load_base(reference, dtype="float32", device="cpu", progress=lambda _: None)
    assert loaded.fingerprint == served.backbone.geometry.fingerprint
