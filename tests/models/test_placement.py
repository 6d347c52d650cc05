"""Names of devices: each is one that this machine has, or refused with what there is."""

import pytest
import torch

from app.models.placement import choose_device


@pytest.mark.parametrize("name", ["gpu", "", "mps", "meta", "cuda:x", "cuda:-1", "cuda:", "cpu:0", "CUDA"])
def test_a_name_that_is_none_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="choose auto, cpu, cuda or cuda:N"):
        choose_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    for number in (2, 999):
        with pytest.raises(ValueError, match=rf"'cuda:{number}' .* finds cuda:0 to cuda:1"):
            choose_device(f"cuda:{number}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="finds no CUDA GPU"):
        choose_device("cuda:0")
