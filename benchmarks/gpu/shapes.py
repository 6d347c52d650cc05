"""Random models of the sizes that are measured, made where they run."""

import copy
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.work import SHAPES as CPU_SHAPES
from benchmarks.work import Shape, config_of, random_model

SHAPES = {
    "qwen2-0.5b": replace(CPU_SHAPES["qwen2-0.4b"], vocabulary=151_936),
    "llama3-8b": Shape(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        intermediate=14_336,
        vocabulary=128_256,
        architecture="llama",
        has_tied_embeddings=False,
    ),
    "tiny": Shape(layers=1, hidden=32, heads=2, kv_heads=1, intermediate=64, vocabulary=128),
}


def model_on(device: str, shape: Shape, seed: int = 0) -> PreTrainedModel:
    """Return random bf16 weights, frozen, which never were in host memory where the device is a GPU.

    On a CPU they are float32: Triton's interpreter has no products of bf16.
    """
    if device == "cpu":
        interpreted = random_model(shape, seed)
        nn.Module.float(interpreted)
        return interpreted
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)
    model.train(False).requires_grad_(False)
    return model


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same model over the same weights, for what must not see our attention."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied: PreTrainedModel = copy.deepcopy(model, shared)
    return copied
