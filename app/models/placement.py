"""Where a base model runs and in which dtype."""

import re

import torch
from transformers.configuration_utils import PreTrainedConfig

from app.errors import UnsupportedModel
from app.models.cpu.products import why_no_int8
from app.models.weights import is_quantized

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?", re.ASCII)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """Return the device for `--device`; `auto` takes CUDA where there is one.

    Raise ValueError: no device of this name, or CUDA without this GPU.
    """
    if not _DEVICE.fullmatch(device):
        raise ValueError(f"unknown device {device!r}; choose auto, cpu, cuda or cuda:N, such as cuda:0")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        _check_gpu(device)
    return torch.device(device)


def _check_gpu(device: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} was asked for, but this torch finds no CUDA GPU; take --device cpu, or "
            "install what is missing (`promptplex doctor` says it)"
        )
    number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"device {device!r} was asked for, but torch finds cuda:0 to cuda:{count - 1}")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype for `--dtype`; `auto` is bf16 where the hardware has it, else float32.

    Raise ValueError: no dtype of this name.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_native_bfloat16()
    return torch.bfloat16 if native else torch.float32


def cpu_has_native_bfloat16() -> bool:
    """Return whether bf16 products run in hardware here (AVX512-BF16, AMX or ARM's)."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return capabilities.startswith("SVE") or bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def cpu_bfloat16_in_words() -> str:
    """Return by which instructions bf16 products run here; AMX multiplies tiles, several times as fast."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX-512 bf16 (no AMX)"
    return "the processor's own" if cpu_has_native_bfloat16() else "none (neither AMX nor AVX-512 bf16)"


def check_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Refuse float16 for encoder-decoders.

    Their layers clamp all rows of a call where one of them overflows, so a request would change others.

    Raise UnsupportedModel.
    """
    if config.is_encoder_decoder and dtype == torch.float16:
        raise UnsupportedModel(
            f"'{config.model_type}' is an encoder-decoder, which can't be served exactly in float16: one "
            "request's overflow would change its neighbours; take --dtype bfloat16 or float32"
        )


def check_int8(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights of 8 bits where no kernel computes with them.

    Raise UnsupportedModel.
    """
    reason = None
    if device.type != "cpu":
        reason = f"only CPUs have kernels for them, and the device is {device}; leave --weights away"
    elif dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        reason = f"activations must be bfloat16, not {name}; take --dtype bfloat16, or leave --weights away"
    elif is_quantized(config):
        reason = f"the weights of this '{config.model_type}' are quantized already; leave --weights away"
    elif (missing := why_no_int8()) is not None:
        reason = f"{missing}; leave --weights away"
    if reason is not None:
        raise UnsupportedModel(f"--weights int8 isn't possible: {reason}")
