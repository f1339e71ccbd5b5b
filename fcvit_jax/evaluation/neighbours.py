"""Classification by the nearest neighbours of features, as DINO evaluates backbones (arXiv 2104.14294, appendix E)."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fcvit_jax import parallel
from fcvit_jax.evaluation.features import Chunk
from fcvit_jax.models.vit import unit_rows

K, TEMPERATURE = 20, 0.07
BLOCK = 4096  # queries


def vote(chunks: Iterable[Chunk], queries: np.ndarray, num_classes: int, mesh: Mesh, held: bool = False) -> np.ndarray:
    """Count the votes of the K labelled features of highest cosine, each with weight exp(cosine / TEMPERATURE).

    queries: float32 [q, d], the same in every process, at most `BLOCK`. held: whether held-out rows vote too. Returns
    float64 [q, c].
    """
    nearest, rows = _program(mesh, held), np.arange(len(queries))[:, None]
    none = np.full((len(queries), K), -np.inf, np.float32), np.zeros((len(queries), K), np.int32)
    queries, *best = jax.device_put((np.asarray(queries), *none), parallel.replicated(mesh))
    for chunk in chunks:
        best = parallel.settled(nearest(queries, *best, *chunk))
    cosine, labels = (np.asarray(each) for each in best)
    votes = np.zeros((len(rows), num_classes))
    np.add.at(votes, (rows, labels), np.exp(cosine.astype(np.float64) / TEMPERATURE))
    return votes


def rank_labels(votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count the classes that come before the right one, or before the first right one; ties in class order.

    votes: [n, c]. labels: int [n], or [n, k] padded with -1. Returns int32 [n].
    """
    labels = labels.reshape(len(labels), -1)
    ranks = np.full(labels.shape, votes.shape[1], np.int32)
    for place, column in enumerate(labels.T):
        own = np.take_along_axis(votes, np.maximum(column, 0)[:, None], axis=1)
        ahead = (votes > own) | ((votes == own) & (np.arange(votes.shape[1])[None] < column[:, None]))
        ranks[:, place] = np.where(column >= 0, ahead.sum(axis=1), ranks[:, place])
    return ranks.min(axis=1)


@functools.cache
def _program(mesh: Mesh, held: bool) -> Any:
    """Make (queries, best cosines, their labels, *chunk) -> the best cosines and labels, including the chunk's."""

    def merge(
        queries: jax.Array, best: jax.Array, known: jax.Array, values: jax.Array, labels: jax.Array, out: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        cosine = jnp.matmul(unit_rows(queries), unit_rows(values).T, precision=jax.lax.Precision.HIGHEST)
        votes = (labels >= 0) & (held | ~out)
        top, places = jax.lax.top_k(jnp.where(votes[None], cosine, -jnp.inf), min(K, len(labels)))
        pairs = [(best, known)] + [
            (cosines, names)
            for cosines, names in zip(
                jax.lax.all_gather(top, "data"), jax.lax.all_gather(labels[places], "data"), strict=True
            )
        ]
        cosines, names = (jnp.concatenate(each, axis=1) for each in zip(*pairs, strict=True))
        best, places = jax.lax.top_k(cosines, K)
        return best, jnp.take_along_axis(names, places, axis=1)

    everywhere, rows = PartitionSpec(), PartitionSpec("data")
    specs = (*[everywhere] * 3, *[rows] * 3)
    return jax.jit(jax.shard_map(merge, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False))
