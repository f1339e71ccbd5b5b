"""The loss as a function of the parameters, which all measures of flatness take."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from fcvit_jax.trees import Params

LossFn = Callable[[Params, Any], tuple[jax.Array, jax.Array]]


class LossSurface(NamedTuple):
    """The mean loss over a fixed list of batches, near the parameters.

    loss_fn: takes (parameters, batch) and returns the mean loss of the batch and its accuracy, float32 scalars. It is a
    static argument of compiled programs: pass the same object again, or an equal one, and nothing compiles twice.
    params: a float32 tree. batches: what loss_fn takes, all of one shape; they are iterated over many times.
    """

    loss_fn: LossFn
    params: Params
    batches: Iterable[Any]
