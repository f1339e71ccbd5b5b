"""Matchings for tests: random ones, and the matching of an image as plain lists."""

import jax
import numpy as np

from fcvit_jax.models.rules import match_tokens


def random_matching(key, layer, prefix, batch=3, width=8):
    metric = jax.random.normal(key, (batch, layer.tokens_in, width))
    return match_tokens(metric, layer, prefix)


def lists(matching, image=0):
    """List for one image the tokens that stay, in the order of the output; those that merge away; their targets."""
    target, order = np.asarray(matching.target)[image], np.asarray(matching.order)[image]
    assert sorted(order) == list(range(len(order)))
    kept = target.max() + 1
    assert target[order[:kept]].tolist() == list(range(kept))
    gone = np.sort(order[kept:])
    return order[:kept].tolist(), gone.tolist(), target[gone].tolist()
