"""The PyTorch side of the benchmark: timm's ViT, and Token Merging on its modules.

Token Merging is written here from its paper, Bolya et al., arXiv 2210.09461, as a PyTorch user would run it: fused
attention with the logarithm of the sizes as its mask, sums by `scatter_reduce`. It merges over all tokens, not in
windows. Shapes: b images, n tokens, d width, h heads, k head width, c classes.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from torch.nn import functional

from fcvit_jax.convert import pytorch
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.rules import ToMe
from fcvit_jax.models.schedule import MergeSchedule


def load_timm(config: ViTConfig, params: Mapping[str, Any]) -> Any:
    """Build timm's model with our weights, float32, in eval mode: what `fcvit_jax.convert --to timm` exports.

    Raises InputError if timm has no such model.
    """
    model = eval(pytorch.timm_call(config), {"timm": timm, "torch": torch, "functools": functools})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        pytorch.write_timm(path, config, params)
        model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    return model.eval()


def with_schedule(model: Any, config: ViTConfig, schedule: MergeSchedule) -> torch.nn.Module | None:
    """Put a model under a schedule: itself if nothing merges; None if `TokenMerging` cannot do it."""
    layers = schedule.plan(config)
    if not any(layer.removed for layer in layers):
        return model
    if config.pool not in ("token", "dist_avg") or any(
        layer.removed and (layer.windows or layer.rule != ToMe()) for layer in layers
    ):
        return None
    return TokenMerging(model, [layer.removed for layer in layers])


class TokenMerging(torch.nn.Module):
    """A timm ViT that merges `removed[l]` tokens in layer l: images [b, 3, height, width] -> logits [b, c]."""

    def __init__(self, model: Any, removed: Sequence[int]):
        super().__init__()
        self.model, self.removed = model, tuple(removed)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        size = None
        for block, removed in zip(model.blocks, self.removed, strict=True):
            y, keys = attend(block.attn, block.norm1(x), size)
            x = x + block.ls1(y)
            if removed:
                x, size = merge_tokens(x, size, keys, removed, model.num_prefix_tokens)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))


def attend(attention: Any, x: torch.Tensor, size: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute proportional attention of x [b, n, d], with size [b, n, 1], or None if all are 1.

    Returns the output [b, n, d] and the keys' mean over the heads, float32 [b, n, k].
    """
    b, n, d = x.shape
    q, k, v = attention.qkv(x).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if size is None else size.log().to(q.dtype).reshape(b, 1, 1, n)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.proj(y.transpose(1, 2).reshape(b, n, d)), k.mean(dim=1, dtype=torch.float32)


def merge_tokens(
    x: torch.Tensor, size: torch.Tensor | None, keys: torch.Tensor, removed: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match on the keys [b, n, k] and average x [b, n, d], weighted by size, with sums in float32.

    Bipartite soft matching: each token at an even position (A) proposes the most similar one at an odd position (B).
    The best proposals are merged; the first `prefix` tokens stay. Returns [prefix][A left, in order][B] and the sizes,
    float32 [b, n - removed, 1].
    """
    in_a, in_b = slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)
    unit = functional.normalize(keys, dim=-1)
    similarity, partner = (unit[:, in_a] @ unit[:, in_b].transpose(1, 2)).max(dim=-1)
    ranked = similarity.argsort(dim=-1, descending=True, stable=True)
    gone, left = ranked[:, :removed], ranked[:, removed:].sort(dim=-1).values
    target = partner.gather(1, gone)

    def add_up(values: torch.Tensor) -> torch.Tensor:
        a, b = values[:, in_a], values[:, in_b]
        kept, moved, into = (index[..., None].expand(-1, -1, values.shape[-1]) for index in (left, gone, target))
        b = b.scatter_reduce(1, into, a.gather(1, moved), "sum")
        return torch.cat([values[:, :prefix], a.gather(1, kept), b], dim=1)

    if size is None:
        size = x.new_ones((*x.shape[:2], 1), dtype=torch.float32)
    total = add_up(size)
    return (add_up(x * size) / total).to(x.dtype), total


def set_precision(dtype: str) -> None:
    """Set how float32 products are computed from now on: exactly, or as "tf32"."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"


class Prepared(NamedTuple):
    """A model ready to be timed. run: makes calls. logits: float32 [m b, c]. bytes: its peak on GPUs."""

    run: Callable[[int], None]
    logits: np.ndarray
    compile_seconds: float | None
    bytes: int | None


def prepare(model: torch.nn.Module, batches: np.ndarray, mode: str | None = None) -> Prepared:
    """Warm a model up on its device, on the first of batches [m, b, height, width, 3]; with a mode, `torch.compile` it.

    compile_seconds includes the first call. bytes: weights, images, and the most that a call takes beside them.
    """
    weight = next(model.parameters())
    cuda = weight.device.type == "cuda"
    images = torch.from_numpy(batches).permute(0, 1, 4, 2, 3).contiguous().to(weight.device, weight.dtype)
    timed, before = images[0], torch.cuda.memory_allocated() if cuda else 0
    # fullgraph: a model that cannot be compiled whole fails, instead of being timed in pieces.
    call = torch.compile(model, mode=mode, dynamic=False, fullgraph=True) if mode else model

    @torch.inference_mode()
    def run(calls: int) -> None:
        for _ in range(calls):
            call(timed)
        if cuda:
            torch.cuda.synchronize()

    started = time.perf_counter()
    run(1)
    compile_seconds = time.perf_counter() - started if mode else None
    run(2)  # CUDA graphs are recorded after the first call
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        logits = np.concatenate([call(batch).float().cpu().numpy() for batch in images])
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), timed))
    used = held + torch.cuda.max_memory_allocated() - before if cuda else None
    return Prepared(run, logits, compile_seconds, used)
