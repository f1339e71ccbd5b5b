"""Weights that another tool has to finish first: adapters to merge, shards to join. Refused with the tool's name."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from fcvit_jax.errors import InputError

_MERGE = "merge them first, with peft: model.merge_and_unload(), then save that model's state_dict"
_ZERO = "holds a part of DeepSpeed's ZeRO checkpoint: join the parts first: python zero_to_fp32.py DIRECTORY OUT"
_DCP = (
    "is a checkpoint of torch.distributed: convert it first: "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY OUT.pth"
)
_QUANTISED = "quantised weights: dequantise them first (transformers: model.dequantize()), then save the state_dict"
_PARAMETRISED = "remove the parametrisation first (torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
# Pattern of a tensor's name -> the content of the file, and the tool.
_NAMES = {
    r"\b(lora_([A-Z]|magnitude)\w*|base_layer|ia3_l|(hada|lokr)_w\d\w*|b?oft_\w+|vera_lambda_\w+)\b": (
        f"low-rank adapters beside the weights they change (LoRA and others): {_MERGE}"
    ),
    r"\b_?flat_param(_\d+)?\b": (
        "parameters that FSDP has flattened: save them with StateDictType.FULL_STATE_DICT, or "
        "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
    ),
    r"\.(absmax|quant_map|quant_state\..*|SCB|qweight|qzeros|weight_packed)$": _QUANTISED,
    r"\.weight_(orig|mask|g|v)$|\.parametrizations\.\w+\.original\d?$": f"weights in parts: {_PARAMETRISED}",
}
# Names of files.
_FILES = {
    r"(bf16_|fp16_)?zero_pp_rank_\d+_.*|.*_optim_states\.pt|zero_to_fp32\.py": _ZERO,
    r"\.metadata|.*\.distcp": _DCP,
}


def check_name(name: str) -> None:
    """Raise InputError if a file of this name is a part of a checkpoint."""
    for pattern, what in _FILES.items():
        if re.fullmatch(pattern, name):
            raise InputError(what)


def check_directory(directory: Path) -> None:
    """Raise InputError, with the directory's name, for a checkpoint in parts, in it or one level below."""
    for entry in (each for pattern in ("*", "*/*") for each in directory.glob(pattern)):
        for pattern, what in _FILES.items():
            if re.fullmatch(pattern, entry.name):
                raise InputError(f"{directory} {what.replace('DIRECTORY', str(entry.parent))}")


def check_finished(arrays: Mapping[str, np.ndarray], beside: Iterable[str]) -> None:
    """Raise InputError if tensors of these names need another tool. beside: the other entries of the file."""
    for pattern, what in _NAMES.items():
        # DINO's heads are weight-normalised; they are left out.
        if found := next((name for name in arrays if re.search(pattern, name) and "last_layer" not in name), None):
            raise InputError(f"has {found!r}, {what}")
    empty = any(not array.size for array in arrays.values())
    if {"ds_version", "param_shapes", "ds_config", "zero_stage"} & {*beside} and (empty or len(arrays) < 8):
        raise InputError(_ZERO)
