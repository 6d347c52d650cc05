"""The base's own input and output embeddings, by the names that checkpoints have for them."""

import hashlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WRAPPERS = {"modules_to_save", "default", "base_layer", "original_module"}  # PEFT's, around a module
_ROWS = 8192  # that are cast and hashed at a time


def own_tensor(model: PreTrainedModel, name: str) -> Tensor | None:
    """Return the weight or bias `[V, ...]` of an embedding, such as `base_model.model.embed_tokens.weight`.

    Only the module's and the parameter's own names count; what stands before them differs with wrappers.
    None where the base has no such tensor, or has it in another form (quantized).
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    for path, module in model.named_modules():
        if module in embeddings and parts[-2:-1] == path.split(".")[-1:]:
            found = getattr(module, parts[-1], None)
            is_plain = type(found) in (Tensor, nn.Parameter)  # those of quantized layers are others
            if isinstance(found, Tensor) and is_plain:
                return found if found.dtype in DTYPES.values() else None
    return None


def embedding_after_prompts(model: PreTrainedModel) -> nn.Module:
    """Return what PEFT embeds a source's ids with after a soft prompt: the first table of the vocabulary.

    PEFT looks in the first part that is a model itself. Without tied embeddings it may not be the encoder's.
    """
    first = next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)
    for name, parameter in first.named_parameters():
        if parameter.ndim == 2 and parameter.shape[0] == model.config.vocab_size:
            return first.get_submodule(name.rpartition(".")[0])
    return model.get_input_embeddings()


def digest_of_rows(tensor: Tensor, rows: int, dtype: str) -> str:
    """Return the sha256 of the first `rows` rows in a dtype of safetensors, little-endian and contiguous."""
    found = hashlib.sha256()
    for begin in range(0, rows, _ROWS):
        chunk = tensor[begin : min(begin + _ROWS, rows)].detach().to("cpu", DTYPES[dtype]).contiguous()
        found.update(chunk.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
