"""A slow, plain PyTorch forward pass with token merging: the oracle of the parity tests.

It is written from the description of the method alone and shares no code with the library, so that the two agree only
if both are right. It runs timm's own modules (`timm.models.vision_transformer.VisionTransformer`) and merges tokens
between attention and MLP:

- Token Merging, Bolya et al., arXiv 2210.09461: bipartite matching on the keys, size-weighted means, proportional
  attention `softmax(q k^T / sqrt(d) + log s)` with `s` the number of patches a key stands for.
- Heo et al., arXiv 2303.02331: first dense layers, then merging inside windows, then merging over all tokens.

A list of *groups* for each image describes how tokens move: the new token `j` is made of the old tokens `groups[j]`. In
a reordering, every group has one member.

Shapes: `b` images, `n` tokens (prefix tokens first: class, distillation, registers), `d` width, `h` heads, `k` head
width, `c` classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

Groups = list[list[int]]


def load_clothing(path: str | Path) -> VisionTransformer:
    """Load the ten-class DINOv2-S/14 classifier of a safetensors file in timm's layout: 224 px, float32, eval mode."""
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=224, num_classes=10)
    assert isinstance(model, VisionTransformer)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)  # float16 in the file, float32 in the model
    return model.float().eval()


@torch.no_grad()
def merged_forward(
    model: VisionTransformer,
    images: torch.Tensor,
    stages: Sequence[tuple],
    metric: str = "key",
    swap_qk: bool = False,
    prop_attn: bool = True,
) -> dict[str, Any]:
    """Compute class logits of a timm ViT that merges tokens, and report what was merged.

    Args:
        model: in eval mode, of any float dtype (float64 for an oracle); pools by 'token' or 'avg', or is distilled.
        images: normalised, `[b, 3, height, width]`.
        stages: `("dense", layers)`, `("local", layers, r, (rows, columns))` with that many windows down and across,
            `("global", layers, r)`; the layers add up to the depth.
        metric: what similarity is measured on: "key", or "value", which is wrong and there to be told apart.
        swap_qk: exchange queries and keys, which is wrong and there to be told apart.
        prop_attn: whether attention adds the logarithm of a key's size.

    Returns:
        `logits` `[b, c]`; `tokens`, the number of tokens that leave each layer; `sizes` `[b, n]`, the patches in each
        final token; `source` `[b, patches]`, where in the final sequence (prefix included) each patch ended; `margin`
        `[b]`, the smallest difference of cosines that decided a merge: what rounding may overturn if it is tiny.

    Raises:
        ValueError: for stages that do not fit the model, and for models outside what is described above.
    """
    if model.training or (model.global_pool not in ("token", "avg")) or model.pool_include_prefix:
        raise ValueError(f"expected a model in eval mode that pools by 'token' or 'avg', not {model.global_pool!r}")
    if sum(stage[1] for stage in stages) != len(model.blocks):
        raise ValueError(f"stages {stages} do not add up to {len(model.blocks)} layers")

    patches = model.patch_embed(images.to(model.patch_embed.proj.weight.dtype))
    # Merging inside windows starts with every patch as its own window.
    windows = tuple(patches.shape[1:3]) if patches.ndim == 4 else model.patch_embed.grid_size
    x = model.norm_pre(model._pos_embed(patches))  # [b, n, d]
    b, n, _ = x.shape
    prefix = model.num_prefix_tokens

    sizes = torch.ones(b, n, dtype=torch.promote_types(x.dtype, torch.float32))
    source = torch.arange(prefix, n).repeat(b, 1)  # [b, patches]
    tokens: list[int] = []
    margins: list[list[float]] = [[] for _ in range(b)]
    blocks = iter(model.blocks)
    after_global = False

    for kind, layers, *rest in stages:
        if kind == "local":
            if after_global:
                raise ValueError("a local stage cannot follow a global one")
            order = coarsen_windows(windows, rest[1], x.shape[1] - prefix)
            order = [[i] for i in range(prefix)] + [[prefix + i] for i in order]
            x, sizes, source = apply_groups([order] * b, x, sizes, source)
            windows = rest[1]
        elif kind == "global":
            after_global = True
        elif kind != "dense":
            raise ValueError(f"unknown stage {kind!r}")

        for _ in range(layers):
            block: Any = next(blocks)
            y, similar_by = attend(block.attn, block.norm1(x), sizes if prop_attn else None, metric, swap_qk)
            x = x + block.ls1(y)
            if kind == "local":
                count = windows[0] * windows[1]
                groups = [
                    group_in_windows(m, prefix, rest[0], count, into)
                    for m, into in zip(similar_by, margins, strict=True)
                ]
                x, sizes, source = apply_groups(groups, x, sizes, source)
            elif kind == "global":
                groups = [group_tokens(m, prefix, rest[0], into) for m, into in zip(similar_by, margins, strict=True)]
                x, sizes, source = apply_groups(groups, x, sizes, source)
            x = x + block.ls2(block.mlp(block.norm2(x)))
            tokens.append(x.shape[1])

    return {
        "logits": classify(model, model.norm(x), sizes),
        "tokens": tokens,
        "sizes": sizes,
        "source": source,
        "margin": torch.tensor([min(found, default=2.0) for found in margins]),
    }


def attend(
    attn: Any, x: torch.Tensor, sizes: torch.Tensor | None, metric: str, swap_qk: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute timm's self-attention, and what tokens are compared by: `[b, n, d] -> [b, n, d], [b, n, k]`."""
    if getattr(attn, "gate", None) is not None:
        raise ValueError("gated attention is not supported")
    b, n, _ = x.shape
    q, k, v = attn.qkv(x).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [b, h, n, k]
    if swap_qk:
        q, k = k, q
    q, k = attn.q_norm(q), attn.k_norm(k)

    exact = torch.promote_types(x.dtype, torch.float32)
    logits = (q.to(exact) @ k.to(exact).transpose(-1, -2)) / math.sqrt(q.shape[-1])  # [b, h, query, key]
    if sizes is not None:
        logits = logits + sizes.log()[:, None, None, :]
    y = (logits.softmax(dim=-1).to(x.dtype) @ v).transpose(1, 2).reshape(b, n, -1)

    compared = {"key": k, "value": v}[metric].to(exact).mean(dim=1)  # over heads, before any normalisation
    return attn.proj(attn.norm(y)), compared


def group_tokens(compared: torch.Tensor, prefix: int, r: int, margins: list[float]) -> Groups:
    """Group the tokens of one image (or one window), r fewer; `compared` is `[n, k]`.

    Even positions are A, odd ones B, prefix tokens counted but never merged. Every A token proposes its most similar
    B token, and the r best proposals are merged. The result is [prefix][A kept, in order][B]; nothing moves if r is 0.
    The margin of each decision, a difference of cosines, is appended to `margins`.
    """
    n = len(compared)
    r = min(r, (n - prefix) // 2)
    if r <= 0:
        return [[i] for i in range(n)]
    a = [i for i in range(prefix, n) if i % 2 == 0]
    b = [i for i in range(prefix, n) if i % 2 == 1]
    unit = torch.nn.functional.normalize(compared, dim=-1)
    best, partner = (unit[a] @ unit[b].T).sort(dim=1, descending=True, stable=True)
    order = best[:, 0].argsort(descending=True, stable=True).tolist()
    chosen, rest = order[:r], order[r:]
    margins += [float(best[i, 0] - best[i, 1]) for i in chosen if len(b) > 1]
    margins += [float(best[chosen[-1], 0] - best[rest[0], 0])] if rest else []
    partner = partner[:, 0].tolist()  # the first B token if several are equally similar
    kept = [[a[i]] for i in range(len(a)) if i not in chosen]
    receiving = [[token] for token in b]
    for i in chosen:
        receiving[partner[i]].append(a[i])
    return [[i] for i in range(prefix)] + kept + receiving


def group_in_windows(compared: torch.Tensor, prefix: int, r: int, windows: int, margins: list[float]) -> Groups:
    """Call `group_tokens` in each of the equally long windows after the prefix, with ceil(r / windows)."""
    groups = [[i] for i in range(prefix)]
    length = (len(compared) - prefix) // windows
    for w in range(windows):
        start = prefix + w * length
        inside = group_tokens(compared[start : start + length], 0, math.ceil(r / windows), margins)
        groups += [[start + i for i in group] for group in inside]
    return groups


def coarsen_windows(old: Sequence[int], new: Sequence[int], patch_tokens: int) -> list[int]:
    """Order patch tokens so that whole old windows, row by row, form new ones, which are row by row too.

    `old` and `new` are numbers of windows, (down, across). The patch grid itself is the finest set of windows.
    """
    if old[0] % new[0] or old[1] % new[1]:
        raise ValueError(f"{old[0]}x{old[1]} patches or windows do not divide into {new[0]}x{new[1]} windows")
    height, width = old[0] // new[0], old[1] // new[1]
    length = patch_tokens // (old[0] * old[1])
    order = []
    for row in range(new[0]):
        for column in range(new[1]):
            for i in range(row * height, (row + 1) * height):
                for j in range(column * width, (column + 1) * width):
                    start = (i * old[1] + j) * length
                    order += range(start, start + length)
    return order


def apply_groups(
    groups: list[Groups], x: torch.Tensor, sizes: torch.Tensor, source: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge each group into one token: the mean weighted by size, in at least float32; sizes add up; patches follow."""
    new_x, new_sizes, new_source = [], [], []
    for image, image_groups in enumerate(groups):
        value, size = x[image].to(sizes.dtype), sizes[image]
        rows, totals, moved_to = [], [], torch.full((len(size),), -1)
        for new, group in enumerate(image_groups):
            total = size[group].sum()
            rows.append((size[group, None] * value[group]).sum(dim=0) / total)
            totals.append(total)
            moved_to[group] = new
        assert (moved_to >= 0).all()
        new_x.append(torch.stack(rows))
        new_sizes.append(torch.stack(totals))
        new_source.append(moved_to[source[image]])
    return torch.stack(new_x).to(x.dtype), torch.stack(new_sizes), torch.stack(new_source)


def classify(model: Any, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Classify `[b, n, d] -> [b, c]`; pooling 'avg' is the mean over patches, weighted by size if tokens merged."""
    if isinstance(model, VisionTransformerDistilled):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    if model.global_pool == "token":
        pooled = x[:, 0]
    else:
        value, size = x[:, model.num_prefix_tokens :].to(sizes.dtype), sizes[:, model.num_prefix_tokens :, None]
        pooled = ((size * value).sum(dim=1) / size.sum(dim=1)).to(x.dtype)
    return model.head(model.fc_norm(pooled))
