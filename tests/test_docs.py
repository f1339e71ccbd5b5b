"""The commands of docs/conversion.md, run as written on files made here; the caches stand in for the network."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pooch.utils
import pytest
from huggingface_hub import constants

import fcvit_jax as fc
from fcvit_jax.convert.__main__ import main
from fcvit_jax.convert.pytorch import write_safetensors
from fcvit_jax.data.preprocess import PRESETS, preset
from fcvit_jax.models.config import Rotary
from states import in_layout

DOCS = Path(__file__).parents[1] / "docs" / "conversion.md"
COMMANDS = re.findall(r"`(python -m fcvit_jax\.convert (?!SRC|--inspect).*?)`", DOCS.read_text())

TINY = replace(fc.zoo.get("vit_tiny_patch16_224").config, depth=2, num_classes=10)
BACKBONE = replace(TINY, num_classes=0)
PIXELS = {"size": {"height": 224, "width": 224}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
HUGGINGFACE = {"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
TIMM_HUB: dict = {
    "architecture": "vit_tiny_patch16_224",
    "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3},
}


def zoo(name):
    return fc.zoo.get(name).config


def save(path, arrays, wrapper=None):
    """Save in the format of the name's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_safetensors(path, arrays)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        torch.save({wrapper: tensors} if wrapper else tensors, path)


def huggingface(config=TINY):
    arrays = in_layout("Hugging Face ViT", config)
    return {key if key.startswith("classifier") else f"vit.{key}": array for key, array in arrays.items()}


def tips():
    arrays = in_layout("DINOv2 with registers", replace(BACKBONE, num_registers=1, layer_scale=1.0))
    arrays["register_tokens"] = arrays.pop("reg_token")
    arrays["pos_embed"] = arrays["pos_embed"][:, :197]
    text = {"text_encoder.token_embedding.weight": np.zeros((5, 64), np.float32), "temperature": np.ones(1)}
    return {f"vision_encoder.{key}": array for key, array in arrays.items()} | text


V3 = replace(BACKBONE, num_registers=4, layer_scale=1.0, learned_positions=False, rotary=Rotary(), key_bias=False)
CLIP = replace(TINY, pre_norm=True, patch_bias=False, norm_eps=1e-5, gelu="quick", head_bias=False)
SIGLIP = replace(BACKBONE, class_token=False, pool="map")
TOWER = {"hidden_size": 192, "num_attention_heads": 3, "image_size": 224, "patch_size": 16}
# Repository -> layout, model, config.json and image processor.
HUBS: dict[str, tuple[str, fc.ViTConfig, dict, str]] = {
    "facebook/dinov3-vits16-pretrain-lvd1689m": (
        "Hugging Face DINOv3", V3, TOWER | {"model_type": "dinov3_vit", "num_register_tokens": 4}, "DINOv3ViT"
    ),
    "google/siglip2-base-patch16-224": (
        "Hugging Face SigLIP", SIGLIP, {"model_type": "siglip", "vision_config": TOWER}, "Siglip"
    ),
    "openai/clip-vit-base-patch32": (
        "Hugging Face CLIP", CLIP, {"model_type": "clip", "vision_config": TOWER, "projection_dim": 10}, "CLIP"
    ),
    "google/tipsv2-b14": ("", TINY, {"model_type": "tipsv2", "vision_config": TOWER}, "Tipsv2"),
}  # fmt: skip


def save_huggingface(folder, repository=""):
    layout, config, stated, processor = HUBS.get(repository, ("", TINY, HUGGINGFACE, "ViT"))
    arrays = tips() if "tips" in repository else in_layout(layout, config) if layout else huggingface()
    save(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(stated))
    pixels = PIXELS | {"image_processor_type": f"{processor}ImageProcessor", "crop_size": 224}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


def in_hub_cache(home, repository):
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def make(source, home):
    """Make the file that a command reads, by its name."""
    here = Path(source)
    scaled = dict(layer_scale=1e-5)
    if source == "my_hf_model":
        save_huggingface(here)
    elif source.startswith("hf-hub:timm/"):
        folder = in_hub_cache(home, source.removeprefix("hf-hub:"))
        save(folder / "model.safetensors", in_layout("timm", replace(TINY, depth=12)))
        (folder / "config.json").write_text(json.dumps(TIMM_HUB))
    elif source.startswith("hf-hub:"):
        repository = source.removeprefix("hf-hub:")
        save_huggingface(in_hub_cache(home, repository), repository)
    elif source in fc.zoo.names():
        folder, architecture = in_hub_cache(home, f"timm/{source}"), source.split(".")[0]
        save(folder / "model.safetensors", in_layout("timm", zoo(architecture)))
        pixels = TIMM_HUB["pretrained_cfg"] | {"input_size": [3, *zoo(architecture).image_size]}
        pool = {"architecture": architecture, "global_pool": zoo(architecture).pool}
        config = TIMM_HUB | pool | {"pretrained_cfg": pixels}
        (folder / "config.json").write_text(json.dumps(config))
    elif source.startswith("https:"):
        arrays = in_layout("timm", zoo("deit3_small_patch16_224"))
        cached = home / "cache" / pooch.utils.unique_file_name(source)
        save(cached, {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): array for key, array in arrays.items()}, "model")
    elif source == "model_best.pth.tar":
        save(here.with_suffix(".pth"), in_layout("timm", TINY), "state_dict_ema")
        here.with_suffix(".pth").rename(here)
    elif source == "deit_tiny.pth":
        save(here, in_layout("timm", zoo("deit_tiny_patch16_224")), "model")
    elif source == "dino_vitsmall16.pth":
        save(here, in_layout("timm", BACKBONE))
    elif source == "dinov2_vitg14_pretrain.pth":
        arrays = in_layout("DINOv2", replace(BACKBONE, gated=True, layer_scale=1.0))
        for ours, theirs in (("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")):
            arrays = {key.replace(ours, theirs): array for key, array in arrays.items()}
        save(here, arrays | {"mask_token": np.zeros((1, 192), np.float32)})
    elif source.startswith("dinov2"):
        config = zoo("vit_small_patch14_reg4_dinov2")
        arrays = in_layout("DINOv2 with registers", config)
        arrays["register_tokens"] = arrays.pop("reg_token")
        arrays["pos_embed"] = np.zeros((1, 37 * 37 + 1, 384), np.float32)
        save(here, arrays | {"mask_token": np.zeros((1, 384), np.float32)})
    elif source == "dinov3_vits16.pth":
        arrays = in_layout("DINOv3, keys biased", replace(V3, key_bias=True))
        arrays["storage_tokens"] = arrays.pop("reg_token", arrays.get("storage_tokens"))
        arrays["rope_embed.periods"] = np.float32(100 ** (np.arange(16) / 16))
        masks = {f"{key}_mask": np.zeros(576, np.float32) for key in arrays if key.endswith("qkv.bias")}
        save(here, arrays | masks)
    elif source == "webli_en_b16.npz":
        arrays = in_layout("big_vision", SIGLIP)
        save(here, {f"params/img/{key}": array for key, array in arrays.items()} | {"params/t": np.ones(1)})
    elif source == "ViT-B-16.pt":
        arrays = {f"visual.{key}": array for key, array in in_layout("OpenAI CLIP", CLIP).items()}
        save(here, arrays | {"positional_embedding": np.zeros((77, 64), np.float32), "logit_scale": np.ones((), "f4")})
    elif source == "open_clip_model.safetensors":
        arrays = in_layout("open_clip", CLIP)
        arrays = {f"visual.{key if key[:5] == 'head.' else f'trunk.{key}'}": array for key, array in arrays.items()}
        save(here, arrays | {"text.token_embedding.weight": np.zeros((5, 64), np.float32)})
    elif source == "PE-Core-T16-384.pt":
        arrays = in_layout("PE", replace(zoo("vit_pe_core_tiny_patch16_384"), head_bias=False))
        save(here, {f"visual.{key}": array for key, array in arrays.items()})
    elif source == "pe_core_t_open_clip.safetensors":
        arrays = in_layout("timm", replace(zoo("vit_pe_core_tiny_patch16_384"), head_bias=True))
        arrays = {f"visual.trunk.{key}": array for key, array in arrays.items()}
        save(here, arrays | {"text.token_embedding.weight": np.zeros((5, 64), np.float32)})
    elif source == "tipsv2.pth":
        save(here, tips())
    elif source == "ijepa.pth.tar":
        arrays = in_layout("timm", replace(BACKBONE, class_token=False, pool="avg"))
        save(here.with_suffix(".pth"), {f"module.{key}": array for key, array in arrays.items()}, "encoder")
        here.with_suffix(".pth").rename(here)
    elif source == "mae_pretrain_vit_base.pth":
        save(here, in_layout("timm", BACKBONE), "model")
    elif source == "mae_finetuned.pth":
        save(here, in_layout("timm", replace(TINY, pool="avg", fc_norm=True)), "model")
    elif source == "clip_tower.safetensors":
        save(here, in_layout("timm", replace(TINY, pre_norm=True, patch_bias=False)))
    elif source == "vit_b_32.pth":
        save(here, in_layout("torchvision", zoo("vit_base_patch32_224")))
    elif source == "vit_swag.pth":
        save(here, in_layout("torchvision", replace(TINY, image_size=(384, 384))))
    elif source in ("S_16.npz", "ViT-B_32.npz"):
        config = TINY if source[0] == "S" else zoo("vit_base_patch32_224")
        save(here, in_layout("Google vision_transformer", config))
    elif source == "vit_s16_in1k_90ep.npz":
        config = replace(TINY, class_token=False, pool="avg", representation_size=192)
        arrays = in_layout("big_vision", config)
        del arrays["pos_embedding"]
        save(here, {f"params/{key}": array for key, array in arrays.items()})
    elif source.startswith("sharded/"):
        save_huggingface(here.parent)
        arrays = huggingface()
        names = sorted(arrays)
        (here.parent / "model.safetensors").unlink()
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for shard, keys in shards.items():
            save(here.parent / shard, {key: arrays[key] for key in keys})
        index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
        here.write_text(json.dumps(index))
    elif source == "vit":
        save(Path("model.safetensors"), in_layout("timm", TINY))
        main(["model.safetensors", "vit", "--preprocess", "timm/augreg"])
    else:
        save(here, in_layout("timm", replace(TINY, **scaled)))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of the caches; the working directory is empty, and there is no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("FCVIT_JAX_CACHE", str(tmp_path / "home" / "cache"))
    return tmp_path / "home"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.removeprefix("python -m fcvit_jax.convert "))
def test_the_command_runs_as_written(command, home, capsys):
    source, out, *flags = shlex.split(command)[3:]
    make(source, home)
    main([source, out, *flags])
    assert Path(out).exists()
    if "--to" in flags:
        assert "in PyTorch: " in capsys.readouterr().out
    else:
        loaded = fc.load_checkpoint(out)
        backbone = re.search("dino|siglip|webli|tips|ijepa|mae_pretrain", source)
        assert loaded.config.num_classes == (0 if backbone else loaded.params["head"]["kernel"].shape[1])
        assert loaded.preprocess.image_size == loaded.config.image_size


def test_there_is_a_command_for_every_kind_of_source():
    assert len(COMMANDS) == 39
    assert len(set(COMMANDS)) == 39


def test_the_python_example_runs_as_written(home, capsys):
    make("deit_small_patch16_224.fb_in1k", home)
    make("model.safetensors", home)
    names = {}
    exec(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0], names)
    assert names["checkpoint"].config.image_size == (224, 224)
    assert names["larger"].config.image_size == (384, 384)
    assert names["path"].name == "deit_s.safetensors"
    assert "layout: timm" in capsys.readouterr().out


def test_the_table_of_presets_is_true():
    told = re.findall(r"^\| `(\w+/[\w-]+)` \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    assert told == [(name, str(preset(name, (224, 224)))) for name in PRESETS]
