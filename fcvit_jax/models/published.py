"""Published rules beside Token Merging's, one class each, and their names in text.

The schedule sets how many tokens each layer removes; the rule chooses which. Windows are treated as images of their
own, and prefix tokens are never removed. Parts that a paper learns or trains are left out. Kept tokens are left in the
order of their scores. Pruned tokens lose their size; merged ones pass it on to their target.

Shape letters: b batch, n tokens, h heads, w head width, d width, p patch tokens, l those of a window, r those removed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.merging import Matching, take_rows
from fcvit_jax.models.rules import (
    RULES,
    Attended,
    Layer,
    Rule,
    class_attention,
    match_tokens,
    mean_over_heads,
    window_order,
)
from fcvit_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class EViT(Rule):
    """Keep the tokens that the class token attends to most: E-ViT, arXiv 2202.07800, section 3.

    Let a_i be the class token's attention to token i, the mean over heads. The r tokens of the lowest a_i are pruned.
    With `fuse` the r + 1 lowest become one token, their sum weighted by attention, sum_i a_i x_i, as in the paper.

    The paper's attention is not proportional to sizes: the fused token counts as one patch.

    The paper keeps a share of the tokens in three layers: 0.7 of 196 is `dense:3,global:1:r57@evit(fuse=true),
    dense:2,global:1:r40@evit(fuse=true),dense:2,global:1:r28@evit(fuse=true),dense:2`. The weights that it trained
    convert as DeiT's do.
    """

    fuse: bool = False

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: Layer, prefix: int) -> Matching:
        def find(inputs: Any) -> Matching:
            attention, size = inputs
            order = _by_score(attention)
            kept = order.shape[1] - layer.removed
            into = jnp.full((len(order), layer.removed), kept - 1, jnp.int32)
            weight = gain = jnp.where(np.arange(order.shape[1])[None] < kept, take_rows(size, order), 0.0)
            if self.fuse:
                weight = weight.at[:, kept - 1 :].set(jnp.maximum(take_rows(attention, order)[:, kept - 1 :], 1e-20))
                gain = gain.at[:, kept - 1].set(1.0)
            return dataclasses.replace(_arrange(order, into, weight, gain), summed=self.fuse)

        return match_windows(find, (attention_to_patches(attended, layer, prefix), size[:, prefix:]), layer, prefix)

    def macs(self, layer: Layer, config: ViTConfig) -> int:
        return _class_attention_macs(layer, config)


@dataclasses.dataclass(frozen=True)
class ToFu(Rule):
    """Prune in the first layers, merge with the norm kept in later ones: ToFu, arXiv 2312.01026, section 3.

    Tokens are matched as in Token Merging. In the first share `prune` of the layers, tokens that would merge are
    pruned. In later layers they merge by MLERP: the mean of the members, scaled to the largest of their norms.

    The paper measures the layer at which a model's response to interpolated tokens becomes linear, and switches there;
    here it is a share of the layers. The mean is weighted by sizes, as Token Merging's.
    """

    prune: float = setting(0.5, low=0, high=1)

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: Layer, prefix: int) -> Matching:
        matching = match_tokens(mean_over_heads(attended.k), layer, prefix)
        if layer.index < self.prune * layer.depth:
            return _prune(matching, size)
        return dataclasses.replace(matching, keep_norm="max")


@dataclasses.dataclass(frozen=True)
class PiToMe(Rule):
    """Merge where many tokens are alike and protect the others: PiToMe, arXiv 2405.16148, section 3.

    Let c_ij be the cosine of the keys' means over heads. Token i has the energy mean_j f(c_ij - m), where f(x) = x
    above 0 and alpha (exp(x) - 1) below. The margin falls with depth: m = margin (1 - layer / layers). The 2r tokens of
    the highest energy, in its order, alternate between the sets A and B. Each of A merges with the most similar of B;
    the other tokens are protected.

    f is that of the official code: above the margin the paper's equation 4 has c instead of c - m. That code also lets
    all tokens alternate in the first half of the layers of a ViT, and merges the r best pairs as Token Merging does:
    `pitome(open=0.5)`, with a margin of 0.75 for DeiT; it leaves proportional attention out.
    """

    margin: float = 0.9
    alpha: float = setting(1.0, low=0)
    open: float = setting(0.0, low=0, high=1)

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: Layer, prefix: int) -> Matching:
        margin, r = self.margin * (1 - layer.index / layer.depth), layer.removed

        def find(metric: jax.Array) -> Matching:
            cosine = _cosine(metric, metric)
            order = _by_score(jax.nn.elu(cosine - margin, self.alpha).mean(axis=-1))
            if layer.index < self.open * layer.depth:
                length = order.shape[1]
                inner = match_tokens(take_rows(metric, order), Layer(length, length - r, r), 0)
                assert inner.order is not None
                return _arrange(take_rows(order, inner.order), take_rows(inner.target, inner.order)[:, length - r :])
            a, b, protected = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
            among = jnp.take_along_axis(take_rows(cosine, a), b[:, None, :], axis=2)
            into = protected.shape[1] + jnp.argmax(among, axis=-1).astype(jnp.int32)
            return _arrange(jnp.concatenate([protected, b, a], axis=1), into)

        metric = jax.lax.stop_gradient(mean_over_heads(attended.k))
        return match_windows(find, metric[:, prefix:], layer, prefix)

    def macs(self, layer: Layer, config: ViTConfig) -> int:
        """Count all cosines; Token Merging computes a quarter of them."""
        windows = layer.windows or 1
        length = (layer.tokens_in - config.num_prefix_tokens) // windows
        return windows * (length**2 - (length // 2) ** 2) * config.embed_dim // config.num_heads


@dataclasses.dataclass(frozen=True)
class DiffRate(Rule):
    """Prune the least attended tokens, merge the next with what they resemble: DiffRate, arXiv 2305.17997, section 3.

    Tokens are sorted by the class token's attention, and the last r are removed. A share `prune` of these, rounded, the
    very last, is pruned; the others merge with the kept token of the highest cosine c of features. The merged token is
    the plain mean, and gains c times their sizes, as in the official code. Cosines below 0 count as 0.

    The paper learns the counts of every layer; `diffrate_s_g2.9` and the other names of `DIFFRATE_KEPT` are the
    published ones. Some of these layers remove more than half of their tokens, which `half=false` allows.
    """

    prune: float = setting(0.4, low=0, high=1)  # about the share in the published counts
    half: bool = True

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: Layer, prefix: int) -> Matching:
        pruned = self.pruned(layer)

        def find(inputs: Any) -> Matching:
            attention, features, size = inputs
            order = _by_score(attention)
            kept, last = order.shape[1] - layer.removed, order.shape[1] - pruned
            features, size = take_rows(features, order[:, :last]), take_rows(size, order)
            cosine = _cosine(features[:, kept:], features[:, :kept])
            into = jnp.argmax(cosine, axis=-1).astype(jnp.int32) if last > kept else order[:, :0]
            into = jnp.pad(into, ((0, 0), (0, pruned)), constant_values=kept - 1)
            alike = jnp.maximum(cosine.max(axis=-1), 0.0)
            gain = jnp.concatenate([size[:, :kept], size[:, kept:last] * alike, 0 * size[:, last:]], axis=1)
            weight = jnp.broadcast_to(jnp.where(np.arange(order.shape[1]) < last, 1.0, 0.0), order.shape)
            return _arrange(order, into, weight, gain)

        features = jax.lax.stop_gradient(x).astype(jnp.float32)
        inputs = attention_to_patches(attended, layer, prefix), features[:, prefix:], size[:, prefix:]
        return match_windows(find, inputs, layer, prefix)

    def pruned(self, layer: Layer) -> int:
        """Count the tokens of each window that are pruned instead of merged."""
        return math.floor(self.prune * layer.removed + 0.5)

    def limit(self, patches: int) -> int:
        return patches // 2 if self.half else patches - 1

    def macs(self, layer: Layer, config: ViTConfig) -> int:
        windows = layer.windows or 1
        length = (layer.tokens_in - config.num_prefix_tokens) // windows
        own = (layer.removed - self.pruned(layer)) * (length - layer.removed) * config.embed_dim
        tome = (length // 2) ** 2 * config.embed_dim // config.num_heads
        return _class_attention_macs(layer, config) + windows * max(0, own - tome)


@dataclasses.dataclass(frozen=True)
class PPT(Rule):
    """Prune in images that have clearly unimportant tokens, merge in others: PPT, arXiv 2310.01812, section 3.

    Token i has the score s_i = a_i |v_i| / sum_j a_j |v_j|: the class token's attention times the norm of the value. In
    images with var(s) of at least `threshold`, the r tokens of the lowest score are pruned; in others tokens merge as
    in Token Merging. The variance is that of the whole image, in windows too.

    With this threshold the official code removes 50 tokens in the 4th, 7th and 10th layer of a DeiT-S:
    `dense:3,global:1:r50@ppt,dense:2,global:1:r50@ppt,dense:2,global:1:r50@ppt,dense:2`.
    """

    threshold: float = setting(7e-5, low=0)

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: Layer, prefix: int) -> Matching:
        v = jax.lax.stop_gradient(attended.v).astype(jnp.float32)
        score = attention_to_patches(attended, layer, prefix) * jnp.sqrt(jnp.square(v).sum(axis=(1, 3)))[:, prefix:]
        score /= score.sum(axis=-1, keepdims=True)
        spread = jnp.var(score, axis=-1, ddof=1)[:, None] >= self.threshold

        def lowest(score: jax.Array) -> Matching:
            order = _by_score(score)
            kept = order.shape[1] - layer.removed
            return _arrange(order, jnp.full((len(order), layer.removed), kept - 1, jnp.int32))

        merged = match_tokens(mean_over_heads(attended.k), layer, prefix)
        pruned = _prune(match_windows(lowest, score, layer, prefix), size)
        target, order = (
            jnp.where(spread, getattr(pruned, part), getattr(merged, part)) for part in ("target", "order")
        )
        assert pruned.weight is not None
        return Matching(target, layer.tokens_out, order, weight=jnp.where(spread, pruned.weight, size))

    def macs(self, layer: Layer, config: ViTConfig) -> int:
        return _class_attention_macs(layer, config)


@dataclasses.dataclass(frozen=True)
class Random(Rule):
    """The control: merge r random tokens, each into a random one of those that stay; with `prune`, drop them instead.

    The choice depends on the seed and the layer alone: it is the same for all images.
    """

    seed: int = setting(0, low=0)
    prune: bool = False

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: Layer, prefix: int) -> Matching:
        drawn = np.random.default_rng((self.seed, layer.index)).random((2, layer.tokens_in - prefix))
        score, goal = jnp.broadcast_to(drawn.astype(np.float32)[:, None], (2, len(x), drawn.shape[1]))

        def find(inputs: Any) -> Matching:
            score, goal = inputs
            order = _by_score(score)
            kept = order.shape[1] - layer.removed
            into = jnp.floor(take_rows(goal, order)[:, kept:] * kept).astype(jnp.int32)
            return _arrange(order, jnp.minimum(into, kept - 1))

        matching = match_windows(find, (score, goal), layer, prefix)
        return _prune(matching, size) if self.prune else matching


RULES |= {"evit": EViT, "tofu": ToFu, "pitome": PiToMe, "diffrate": DiffRate, "ppt": PPT, "random": Random}

# Name of the schedule -> tokens left of 197 after pruning, and after merging, in each layer of a DeiT-S or a DeiT-B.
# The number in the name is its GMACs. From DiffRate's official repository, compression_rate.json.
DIFFRATE_KEPT = {
    "diffrate_s_g2.3": ("197 192 168 143 121 105 92 74 62 45 33 3", "197 180 156 127 109 98 80 66 52 37 31 3"),
    "diffrate_s_g2.5": ("197 192 174 156 131 115 111 99 76 50 39 3", "197 186 160 133 119 107 96 82 66 43 37 3"),
    "diffrate_s_g2.7": ("197 196 182 160 141 127 115 105 88 66 49 3", "197 188 170 147 131 119 109 96 76 54 45 3"),
    "diffrate_s_g2.9": ("197 196 190 168 150 139 129 117 99 78 58 3", "197 194 176 156 141 133 121 107 88 64 56 3"),
    "diffrate_s_g3.1": ("197 197 194 180 160 147 137 129 115 92 76 3", "197 196 186 164 150 141 133 121 103 78 68 3"),
    "diffrate_b_g8.7": ("197 192 172 156 131 107 90 72 56 33 17 3", "197 178 162 141 115 96 78 60 47 21 13 3"),
    "diffrate_b_g10.0": ("197 194 182 168 148 129 113 101 82 49 25 3", "197 186 174 156 137 117 105 90 66 31 19 3"),
    "diffrate_b_g10.4": ("197 196 188 174 156 141 121 103 90 58 25 3", "197 190 184 164 145 131 107 94 74 31 21 3"),
    "diffrate_b_g11.5": ("197 197 197 188 170 154 139 123 107 72 43 3", "197 197 192 178 158 145 127 111 94 50 35 3"),
    "diffrate_b_g12.5": ("197 197 196 192 184 170 154 139 129 94 58 3", "197 196 194 190 176 160 145 131 115 68 47 3"),
}


def diffrate_layers(name: str) -> list[tuple[int, DiffRate]]:
    """Return how many tokens each layer of a schedule of `DIFFRATE_KEPT` removes, and by which rule."""
    layers, tokens = [], 197
    for after_pruning, left in zip(*(map(int, counts.split()) for counts in DIFFRATE_KEPT[name]), strict=True):
        removed, pruned = tokens - left, max(tokens - after_pruning, 0)
        layers.append((removed, DiffRate(round(pruned / max(removed, 1), 3), half=removed <= (tokens - 1) // 2)))
        tokens = left
    return layers


def attention_to_patches(attended: Attended, layer: Layer, prefix: int) -> jax.Array:
    """Compute the class token's attention to each patch token, float32 [b, p], the mean over heads.

    Without a class token, it is the mean attention that a patch token receives from all tokens.
    """
    if prefix and layer.class_token:
        return class_attention(attended, layer, prefix)[:, prefix:]
    attended = jax.lax.stop_gradient(attended)
    (q, k), size = attended.turned or (attended.q, attended.k), attended.size
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    logits = jnp.einsum("bhqw,bhnw->bhqn", q, k, preferred_element_type=jnp.float32)
    logits += 0.0 if size is None else jnp.log(size)[:, None, None]
    return jax.nn.softmax(logits).mean(axis=(1, 2))[:, prefix:]


def match_windows(find: Callable[[Any], Matching], inputs: Any, layer: Layer, prefix: int) -> Matching:
    """Match the patch tokens of each window separately, or of the whole sequence if the layer has no windows.

    inputs: of the patch tokens, a pytree of [b, n - prefix, ...]. find: takes the same, with windows in the place of
    images, and returns their matching, with its order.
    """
    batch, patches = jax.tree.leaves(inputs)[0].shape[:2]
    windows = layer.windows or 1
    length = patches // windows
    grouped = window_order(*layer.regroup, patches) if layer.regroup else None

    def split(x: jax.Array) -> jax.Array:
        x = x if grouped is None else x[:, grouped]
        return x.reshape(batch * windows, length, *x.shape[2:])

    def join(x: jax.Array | None, leading: np.ndarray) -> jax.Array | None:
        """Join [b * windows, length] to [b, n], with the prefix tokens' values in front."""
        if x is None:
            return None
        x = x.reshape(batch, -1)
        x = x if grouped is None else x[:, np.argsort(grouped)]
        return jnp.concatenate([jnp.broadcast_to(leading.astype(x.dtype), (batch, prefix)), x], axis=1)

    found = find(jax.tree.map(split, inputs))
    assert found.order is not None
    kept, leading, ones = found.tokens_out, np.arange(prefix), np.ones(prefix)
    window = np.arange(windows, dtype=np.int32)[None, :, None]
    target, order = (part.reshape(batch, windows, length) for part in (found.target, found.order))
    target, order = prefix + target + kept * window, order + length * window
    stay, go = (part.reshape(batch, -1) for part in (order[:, :, :kept], order[:, :, kept:]))
    order = jnp.concatenate([stay, go], axis=1)
    order = prefix + (order if grouped is None else jnp.asarray(grouped)[order])
    order = jnp.concatenate([jnp.broadcast_to(leading.astype(np.int32), (batch, prefix)), order], axis=1)
    return dataclasses.replace(
        found,
        target=join(target, leading),
        tokens_out=layer.tokens_out,
        order=order,
        weight=join(found.weight, ones),
        gain=join(found.gain, ones),
    )


def _class_attention_macs(layer: Layer, config: ViTConfig) -> int:
    return layer.tokens_in * config.embed_dim * (1 if config.class_token else layer.tokens_in)


def _by_score(score: jax.Array) -> jax.Array:
    """Sort the tokens from the highest score to the lowest, int32 [b, l]; ties stay in order."""
    return jnp.argsort(score, axis=-1, stable=True, descending=True).astype(jnp.int32)


def _arrange(
    order: jax.Array, into: jax.Array, weight: jax.Array | None = None, gain: jax.Array | None = None
) -> Matching:
    """Make a matching of tokens in an order, int32 [b, l], whose last r go `into` the places of the first.

    into: int32 [b, r]. weight, gain: float32 [b, l], in this order.
    """
    kept, back = order.shape[1] - into.shape[1], jnp.argsort(order, axis=1)
    places = jnp.broadcast_to(np.arange(kept, dtype=np.int32), (len(order), kept))
    target, weight, gain = (
        None if part is None else take_rows(part, back)
        for part in (jnp.concatenate([places, into], axis=1), weight, gain)
    )
    assert target is not None
    return Matching(target, kept, order, weight, gain)


def _prune(matching: Matching, size: jax.Array) -> Matching:
    """Drop what a matching would merge away."""
    assert matching.order is not None
    place = jnp.argsort(matching.order, axis=1)
    return dataclasses.replace(matching, weight=jnp.where(place < matching.tokens_out, size, 0.0))


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosines of all pairs: float32 [b, i, d] and [b, j, d] -> [b, i, j]."""
    x, y = (z / jnp.sqrt(jnp.maximum(jnp.square(z).sum(axis=-1, keepdims=True), 1e-30)) for z in (x, y))
    return jnp.einsum("bik,bjk->bij", x, y, precision=jax.lax.Precision.HIGHEST)
