import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcvit_jax.convert import inspect
from fcvit_jax.convert.downloads import weight_file
from fcvit_jax.convert.readers import read_weights
from fcvit_jax.errors import InputError
from states import refusal, state_dict, write


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("base_model.model.blocks.0.attn.qkv.base_layer.weight", "model.merge_and_unload"),
        ("base_model.model.blocks.0.attn.qkv.lora_A.default.weight", "model.merge_and_unload"),
        ("blocks.0.attn.qkv.lora_B", "model.merge_and_unload"),
        ("blocks.0.attn.qkv.lora_magnitude_vector.default.weight", "model.merge_and_unload"),
        ("blocks.0.attn.qkv.hada_w1_a.default", "model.merge_and_unload"),
        ("blocks.0.mlp.fc1.ia3_l.default", "model.merge_and_unload"),
        ("_fsdp_wrapped_module._flat_param", "full_state_dict=True"),
        ("flat_param_0", "full_state_dict=True"),
        ("blocks.0.mlp.fc1.weight_mask", "prune.remove"),
        ("blocks.0.mlp.fc1.parametrizations.weight.original0", "remove_parametrizations"),
        ("blocks.0.mlp.fc1.weight.quant_state.bitsandbytes__nf4", "dequantise them first"),
        ("blocks.0.mlp.fc1.qweight", "dequantise them first"),
    ],
)
def test_the_tool_for_weights_in_parts_is_named(tmp_path, name, tool):
    arrays: Any = state_dict() | {name: np.ones(3)}
    np.savez(tmp_path / "w.npz", **arrays)
    message = refusal(tmp_path / "w.npz")
    assert message.startswith(f"has {name!r}, ")
    assert tool in message


def test_whole_weights_with_similar_names_are_read(tmp_path):
    names = ("head.last_layer.weight_g", "head.last_layer.weight_v", "lorax.weight", "blocks.0.weight_gate")
    np.savez(tmp_path / "w.npz", **state_dict(), **dict.fromkeys(names, np.ones(3)))
    assert set(names) < read_weights(tmp_path / "w.npz").arrays.keys()


def test_shards_of_zero_name_their_script(tmp_path):
    torch = pytest.importorskip("torch")
    whole = {name: torch.tensor(array) for name, array in state_dict().items()}
    empty = dict.fromkeys(whole, torch.empty(0))
    torch.save({"module": empty, "param_shapes": [], "ds_version": "0.16"}, tmp_path / "renamed.pt")
    torch.save({"module": whole, "param_shapes": [], "ds_version": "0.16"}, tmp_path / "mp_rank_00_model_states.pt")
    assert "python zero_to_fp32.py DIRECTORY OUT" in refusal(tmp_path / "renamed.pt")
    assert read_weights(tmp_path / "mp_rank_00_model_states.pt").arrays.keys() == whole.keys()  # of ZeRO 1 and 2


PARTS = {
    "zero_pp_rank_0_mp_rank_00_model_states.pt": "zero_to_fp32.py",
    "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt": "zero_to_fp32.py",
    ".metadata": "dcp_to_torch",
    "__0_0.distcp": "dcp_to_torch",
}


@pytest.mark.parametrize(("name", "tool"), PARTS.items())
@pytest.mark.parametrize("folder", ["", "global_step10"])
def test_files_and_folders_of_parts_name_their_tool(tmp_path, name, tool, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    part = write(tmp_path / folder / name, b"PK")
    assert tool in refusal(part)
    (tmp_path / "latest").write_text("global_step10")
    with pytest.raises(InputError, match=tool) as caught:
        inspect(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}")
    if tool == "dcp_to_torch":
        assert f"dcp_to_torch {part.parent} OUT" in str(caught.value)


def test_a_directory_of_torch_distributed_as_torch_writes_it(tmp_path):
    torch = pytest.importorskip("torch")
    dcp: Any = importlib.import_module("torch.distributed.checkpoint")

    state = {name: torch.tensor(array) for name, array in state_dict().items()}
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    with pytest.raises(InputError, match="dcp_to_torch"):
        inspect(tmp_path / "dcp")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pth")  # the function that the message names
    assert read_weights(tmp_path / "whole.pth").arrays.keys() == state.keys()


def test_a_directory_with_whole_weights_beside_parts_is_read(tmp_path):
    np.savez(tmp_path / "w.npz", **state_dict())
    (tmp_path / "global_step1").mkdir()
    write(tmp_path / "global_step1" / "zero_pp_rank_0_mp_rank_00_model_states.pt", b"x")
    assert weight_file(tmp_path) == Path(tmp_path / "w.npz")
