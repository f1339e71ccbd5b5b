"""Where a merged token lies: what each choice of its rotary position does to a model's predictions.

python train_sam.py --config=configs/digits_rotary.py --workdir=W
python benchmarks/positions.py W/checkpoint digits:test --out positions.md
python benchmarks/positions.py W/checkpoint digits:test --random --out random.md

mean         the mean of its members' coordinates, weighted by size: what the library does
stays        the coordinates of the member that stays
angles       the mean of the members' cosines and sines, weighted by size, which is shorter than 1
directions   the same at length 1
row-major    the first positions of the grid, as in a model that recomputes positions after merging

KL           mean over images of KL(dense || merged) of the predicted classes
of mean      KL over that of "mean", with its bootstrap interval over images
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from contenders import random_params
from scipy.special import log_softmax

import fcvit_jax as fc
from fcvit_jax.data.preprocess import decode
from fcvit_jax.data.sources import open_source
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.evaluation.statistics import ratio_of_means
from fcvit_jax.models import attention, vit
from fcvit_jax.models.config import Rotary
from fcvit_jax.models.merging import Matching, take_rows
from fcvit_jax.models.positions import grid_coordinates, rotate


class Choice(NamedTuple):
    """What tokens carry, [1 or b, n, c], how it merges, and how it turns queries or keys [b, h, n, w]."""

    start: Callable[[fc.ViTConfig], Any] = grid_coordinates
    merge: Callable[[jax.Array, jax.Array, Matching], jax.Array] = vit.merge_coordinates
    turn: Callable[[jax.Array, jax.Array, Rotary], jax.Array] = rotate

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Make the library's models merge positions by this choice."""
        with (
            mock.patch.object(vit, "grid_coordinates", self.start),
            mock.patch.object(vit, "merge_coordinates", self.merge),
            mock.patch.object(attention, "rotate", self.turn),
        ):
            yield


def everywhere(carried: jax.Array, size: jax.Array) -> jax.Array:
    return jnp.broadcast_to(carried, (*size.shape, carried.shape[-1]))


def stay(carried: jax.Array, size: jax.Array, matching: Matching) -> jax.Array:
    assert matching.order is not None
    return take_rows(everywhere(carried, size), matching.order[:, : matching.tokens_out])


def average(carried: jax.Array, size: jax.Array, matching: Matching) -> jax.Array:
    plain = Matching(matching.target, matching.tokens_out, matching.order)
    return fc.merge_tokens(everywhere(carried, size), size, plain)[0]


def row_major(carried: jax.Array, size: jax.Array, matching: Matching) -> jax.Array:
    return everywhere(carried, size)[:, : matching.tokens_out]


def unit_vectors(config: fc.ViTConfig) -> jax.Array:
    """Compute the cosine and sine of every angle of a token, in the places of the pair that it turns: [1, n, w]."""
    assert config.rotary
    first = join(jnp.ones(config.head_dim // 2), jnp.zeros(config.head_dim // 2), config.rotary)
    pairs = jnp.broadcast_to(first, (1, 1, config.num_tokens, config.head_dim))
    return rotate(pairs, jnp.asarray(grid_coordinates(config)), config.rotary)[:, 0]


def split(x: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array]:
    half = x.shape[-1] // 2
    return (x[..., :half], x[..., half:]) if rotary.rotation == "half" else (x[..., ::2], x[..., 1::2])


def join(first: jax.Array, second: jax.Array, rotary: Rotary) -> jax.Array:
    if rotary.rotation == "half":
        return jnp.concatenate([first, second], axis=-1)
    return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)


def turn_by(x: jax.Array, carried: jax.Array, rotary: Rotary) -> jax.Array:
    (first, second), (cos, sin) = split(x, rotary), split(carried[:, None], rotary)
    return join(first * cos - second * sin, second * cos + first * sin, rotary)


def turn_at_length_1(x: jax.Array, carried: jax.Array, rotary: Rotary) -> jax.Array:
    cos, sin = split(carried, rotary)
    length = jnp.sqrt(jnp.maximum(cos**2 + sin**2, 1e-12))
    return turn_by(x, join(cos / length, sin / length, rotary), rotary)


CHOICES = {
    "mean": Choice(),
    "stays": Choice(merge=stay),
    "angles": Choice(unit_vectors, average, turn_by),
    "directions": Choice(unit_vectors, average, turn_at_length_1),
    "row-major": Choice(merge=row_major),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    checkpoint = fc.load_checkpoint(args.checkpoint)
    config, params = checkpoint.config, checkpoint.params
    if config.rotary is None:
        raise InputError(f"{args.checkpoint}: positions are not rotary: pass a model of configs/digits_rotary.py")
    params = random_params(config) if args.random else params
    source = open_source(args.dataset)
    pixels = [checkpoint.preprocess(decode(source[i].image, "")) for i in range(len(source))[: args.limit]]
    images = checkpoint.preprocess.normalize(np.stack(pixels))
    dense = log_probabilities(config, params, images, "dense")
    lines = ["| schedule | position | KL | of mean | 95 % |", "|---|---|---|---|---|"]
    for schedule in args.schedules.split(","):
        divergences = {}
        for name, choice in CHOICES.items():
            with choice.applied():
                merged = log_probabilities(config, params, images, schedule)
            divergences[name] = (np.exp(dense) * (dense - merged)).sum(axis=1)
            ratio, low, high = ratio_of_means(divergences[name].clip(0), divergences["mean"].clip(0))
            compared = " | " if name == "mean" else f"{ratio:.2f} | {low:.2f} to {high:.2f}"
            lines.append(f"| `{schedule}` | {name} | {divergences[name].mean():.3g} | {compared} |")
    args.out.write_text("\n".join(lines) + "\n")
    print(args.out.read_text())


def log_probabilities(config: fc.ViTConfig, params: Any, images: jax.Array, schedule: str) -> np.ndarray:
    """Compute the log probability of every image and class, float64 [images, c]."""
    model = fc.ViT(config, fc.MergeSchedule.parse(schedule, config.depth))
    run = jax.jit(lambda params, images: model.apply({"params": params}, images)[0])  # one program a choice
    parts = [np.asarray(run(params, part)) for part in np.array_split(images, -(-len(images) // 64))]
    return log_softmax(np.concatenate(parts).astype(np.float64), axis=1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", help="of a model with rotary positions")
    parser.add_argument("dataset", help="images: folder:PATH, digits:test or tfds:NAME/SPLIT")
    parser.add_argument("--schedules", default="tome_r4,tome_r8,tome_r12", help="with @RULE, if not tome")
    parser.add_argument("--random", action="store_true", help="random weights in place of the checkpoint's")
    parser.add_argument("--limit", type=int, help="the first images only")
    parser.add_argument("--out", type=Path, required=True, help="file for the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with one_line_errors():
        main()
