"""From files to a model with every weight from them, or a refusal in one line."""

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from app.errors import UnsupportedModel

_MODELING = logging.getLogger("transformers.modeling_utils")
_NAMES_SHOWN = 3
_QUANTIZED = re.compile("I8|F8|F6|F4")  # types as safetensors writes them; U8 are masks of old models
_LONGEST_REASON = 600
# transformers would apply an adapter that lies beside the weights, or load the base that the adapter
# names instead; what lies there is looked at by app/models/adapter.py. No folder has this name.
_NO_ADAPTER = {"subfolder": "no-adapter"}


def in_one_line(error: BaseException) -> str:
    """Return the text of another library's exception, for a message of ours."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"it needs a package that isn't there (pip install {error.name.partition('.')[0]})"
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__


def find_file(reference: str, name: str) -> Path | None:
    """Return a file of a directory or of a repository on the hub; None where there is none."""
    found = cached_file(
        reference,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def model_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that makes a text-generating model of a configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_weights(
    reference: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    progress: Callable[[str], None],
) -> PreTrainedModel:
    """Return a frozen model on `device`; `progress` reports tensors that belong to nothing in it.

    `attention` names an implementation that transformers knows; None takes its own choice.

    Raise UnsupportedModel: the files can't be loaded, or don't hold every weight of the architecture.
    """
    _check_quantization(reference, config)
    # A quantized layer may not be moved to another device after it was made.
    placement = {"device_map": {"": str(device)}} if is_quantized(config) else {}
    table = _Table()
    _MODELING.addFilter(table)
    try:
        loaded: Any = model_class(config).from_pretrained(
            reference,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            adapter_kwargs=dict(_NO_ADAPTER),
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **placement,
        )
    except Exception as error:  # transformers and quantizers raise whatever they like
        reason = table.reason() or in_one_line(error)
        raise UnsupportedModel(f"cannot load the weights of '{reference}': {reason}") from error
    finally:
        _MODELING.removeFilter(table)
    model: PreTrainedModel = loaded[0]
    _check_complete(reference, loaded[1], progress)
    if not placement:
        _move(model, device, reference)
    model.eval()
    model.requires_grad_(False)
    return model


def _move(model: PreTrainedModel, device: torch.device, reference: str) -> None:
    try:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps torch's signature away
    except torch.OutOfMemoryError as error:
        num_bytes = sum(each.nbytes for each in model.state_dict().values())
        raise UnsupportedModel(
            f"the weights of '{reference}', {num_bytes / (1 << 30):.1f} GiB in {model.dtype}, don't fit on "
            f"{device}: end other programs on it, take a smaller dtype or base, or a larger GPU "
            f"({in_one_line(error)})"
        ) from error


class _Table(logging.Filter):
    """Takes transformers' table of names that don't fit out of the log: a refusal in one line replaces it."""

    _failed = re.compile(r"^(\S.*?) +\| *(?:\x1b\[[0-9;]*m)?CONVERSION", re.MULTILINE)

    def __init__(self) -> None:
        super().__init__()
        self._text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record stays in the log."""
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return True
        self._text = text
        return False

    def reason(self) -> str | None:
        """Name the weights that couldn't be put together from their parts; only the table has them."""
        names = self._failed.findall(self._text)
        return f"parts are missing, or have other shapes, of {some_of(names)}" if names else None


def is_quantized(config: PreTrainedConfig) -> bool:
    """Return whether the configuration names a method of quantization."""
    return getattr(config, "quantization_config", None) is not None


def _check_quantization(reference: str, config: PreTrainedConfig) -> None:
    """Refuse what an unknown method made: it would be loaded as if it were plain weights."""
    if not is_quantized(config):
        return
    try:
        is_known = AutoHfQuantizer.supports_quant_method(config.quantization_config)
    except ValueError:
        is_known = False
    if not is_known:
        raise UnsupportedModel(
            f"config.json of '{reference}' has a quantization_config with a quant_method that this version "
            "of transformers doesn't know"
        )


def check_unquantized(reference: str, config: PreTrainedConfig, files: Iterable[Path]) -> None:
    """Refuse numbers that mean nothing without scales where the configuration has none.

    transformers would convert them as they are. Some tools write how they quantized to a file of their own.
    """
    if is_quantized(config):
        return
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                types = {name: str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
            if narrow := sorted(
                f"{name} ({type_})" for name, type_ in types.items() if _QUANTIZED.match(type_)
            ):
                raise UnsupportedModel(
                    f"the weights of '{reference}' are quantized: {some_of(narrow)}, but its config.json has "
                    "no quantization_config that says how; add it, or take the unquantized model"
                )


def weight_files(reference: str, config: PreTrainedConfig) -> list[Path]:
    """Return the files that transformers reads this base from, in the order in which it looks for them.

    Raise UnsupportedModel: the configuration names files that aren't safetensors, or there are none.
    """
    named = getattr(config, "transformers_weights", None)
    names = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    if not all(str(name).endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise UnsupportedModel(
            f"config.json of '{reference}' names the weights '{named}'; only safetensors are loaded"
        )
    if Path(reference).is_dir() and any(Path(reference).glob("shard-*-model-*-of-*.safetensors")):
        raise UnsupportedModel(
            f"'{reference}' holds a distributed checkpoint; save the model with save_pretrained, as one "
            "process has it"
        )
    first = next((found for name in names if (found := find_file(reference, name)) is not None), None)
    if first is None:
        raise UnsupportedModel(
            f"cannot load the weights of '{reference}': it has no {' and no '.join(names)}"
        )
    extra = (find_file(reference, name) for name in getattr(type(config), "extra_files", ()))
    return [*_shards(reference, first), *(file for file in extra if file is not None)]


def _shards(reference: str, file: Path) -> list[Path]:
    if file.suffix != ".json":
        return [file]
    try:
        shards, _ = get_checkpoint_shard_files(reference, str(file))
    except Exception as error:
        raise UnsupportedModel(f"cannot load the weights of '{reference}': {in_one_line(error)}") from error
    return [Path(shard) for shard in shards]


def _check_complete(reference: str, report: dict[str, Any], progress: Callable[[str], None]) -> None:
    """Refuse a model with weights that aren't from the files: transformers makes up random ones."""
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing:
        raise UnsupportedModel(
            f"the weights of '{reference}' are not complete: {some_of(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not there{_hint(missing, unexpected)}"
        )
    if report["mismatched_keys"]:
        wrong = [
            f"{name} {tuple(found)} instead of {tuple(want)}"
            for name, found, want in report["mismatched_keys"]
        ]
        raise UnsupportedModel(
            f"the weights of '{reference}' don't have the shapes that config.json says: {some_of(wrong)}"
        )
    if unexpected:
        progress(f"left out, since nothing in the architecture has these names: {some_of(unexpected)}")


def _hint(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Explain names that are right but for something before them: the model was saved in a wrapper."""
    wanted = set(missing)
    for name in sorted(unexpected):
        parts = name.split(".")
        for number in range(1, len(parts)):
            if ".".join(parts[number:]) in wanted:
                before = ".".join(parts[:number])
                return f"; there is '{name}', with '{before}.' in front: save the model without its wrapper"
    return f"; names in the files that belong to nothing: {some_of(unexpected)}" if unexpected else ""


def some_of(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:_NAMES_SHOWN])
    return shown if len(ordered) <= _NAMES_SHOWN else f"{shown} and {len(ordered) - _NAMES_SHOWN} more"
