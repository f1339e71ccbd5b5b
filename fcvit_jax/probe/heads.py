"""Linear heads on features, fitted by passes over chunks: logistic regression, ridge regression, class means.

Every process sums over its own rows, every device over its own. The sums are added in float64: the numbers of devices
and processes change the head by rounding only.

Shape letters: m rows of a chunk, d width, c classes.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcvit_jax import parallel
from fcvit_jax.evaluation.features import Chunk
from fcvit_jax.models.vit import unit_rows

MOST_ITERATIONS = 300  # of L-BFGS, for each strength
ROWS = {"fit": lambda held: ~held, "held": lambda held: held, "all": jnp.ones_like}  # which rows of a chunk count


class Head(NamedTuple):
    """A linear head, logits = x kernel + bias: float32 [d, c] and [c]. unit: x is scaled to length 1 first."""

    kernel: np.ndarray
    bias: np.ndarray
    unit: bool = False


class Score(NamedTuple):
    """How well a head does on some rows. loss: the mean cross-entropy."""

    correct: int
    count: int
    loss: float


Fit = Callable[[str, float], Head]  # (which of `ROWS`, strength) -> head


def score(head: Head, chunks: Iterable[Chunk], rows: str) -> Score:
    """Evaluate a head on the rows of `ROWS`."""
    correct, count, loss = _sum(_score, chunks, rows, *head[:2], unit=head.unit)
    return Score(round(float(correct)), round(float(count)), float(loss / count))


def logistic(chunks: Iterable[Chunk], num_classes: int) -> Fit:
    """Prepare multinomial logistic regression of standardised features, by L-BFGS from the last fit.

    Minimises the mean cross-entropy + strength / 2 |kernel|^2, with the kernel of the standardised features.
    """
    from scipy.optimize import minimize  # takes a second to import

    moments, last = functools.cache(functools.partial(_moments, chunks)), {}

    def fit(rows: str, strength: float) -> Head:
        count, mean, std = moments(rows)
        width = len(mean)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(width + 1, num_classes)
            kernel, bias = (each.astype(np.float32) for each in (weights[:-1], weights[-1]))
            loss, *slopes = _sum(_logistic, chunks, rows, kernel, bias, mean, std)
            gradient = np.concatenate([slopes[0], slopes[1][None]]) / count
            gradient[:-1] += strength * weights[:-1]
            return float(loss / count + strength / 2 * np.square(weights[:-1]).sum()), gradient.ravel()

        start = last.get("flat", np.zeros((width + 1) * num_classes))
        options = {"maxiter": MOST_ITERATIONS, "gtol": 1e-5, "ftol": 1e-9}
        last["flat"] = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
        weights = last["flat"].reshape(width + 1, num_classes)
        return _folded(weights[:-1], weights[-1], mean, std)

    return fit


def ridge(chunks: Iterable[Chunk], num_classes: int) -> Fit:
    """Prepare ridge regression of one-hot labels on standardised features, in closed form; logits are the scores.

    Minimises the mean squared error + strength |kernel|^2.
    """

    @functools.cache
    def solve(rows: str) -> tuple[np.ndarray, ...]:
        count, mean, std = _moments(chunks, rows)
        gram, products, shares = (
            total / count for total in _sum(_products, chunks, rows, mean, std, num_classes=num_classes)
        )
        values, vectors = np.linalg.eigh(gram)
        return np.maximum(values, 0), vectors, vectors.T @ products, shares, mean, std

    def fit(rows: str, strength: float) -> Head:
        values, vectors, products, shares, mean, std = solve(rows)
        return _folded(vectors @ (products / (values + strength)[:, None]), shares, mean, std)

    return fit


def class_means(chunks: Iterable[Chunk], num_classes: int) -> Fit:
    """Prepare class means: the cosine to each class's mean of features of length 1. The strength is unused."""

    def fit(rows: str, strength: float) -> Head:
        (sums,) = _sum(_class_sums, chunks, rows, num_classes=num_classes)
        kernel = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T
        return Head(kernel.astype(np.float32), np.zeros(num_classes, np.float32), unit=True)

    return fit


def calibrate(head: Head, chunks: Iterable[Chunk]) -> float:
    """Find the factor on the logits with the lowest cross-entropy on the held-out labels."""
    from scipy.optimize import minimize_scalar

    def loss(power: float) -> float:
        return score(scaled(head, float(np.exp(power))), chunks, "held").loss

    return float(np.exp(minimize_scalar(loss, bounds=(-2, 7), method="bounded", options={"xatol": 1e-2}).x))  # pyright: ignore[reportAttributeAccessIssue]


def scaled(head: Head, factor: float) -> Head:
    """Scale a head's logits by a factor."""
    return head._replace(kernel=head.kernel * np.float32(factor), bias=head.bias * np.float32(factor))


def _folded(kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Head:
    """Convert a head on standardised features to the same head on plain features."""
    kernel = kernel / std[:, None].astype(np.float64)
    return Head(kernel.astype(np.float32), (bias - mean.astype(np.float64) @ kernel).astype(np.float32))


def _moments(chunks: Iterable[Chunk], rows: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Count the rows, and compute each feature's mean and standard deviation, 1 for a constant feature."""
    count, sums = _sum(_totals, chunks, rows)
    mean = (sums / count).astype(np.float32)
    (squares,) = _sum(_squares, chunks, rows, mean)
    std = np.sqrt(squares / count)
    return float(count), mean, np.where(std > 1e-6 * np.abs(mean) + 1e-12, std, 1.0).astype(np.float32)


def _sum(function: Any, chunks: Iterable[Chunk], rows: str, *arguments: Any, **static: Any) -> list[np.ndarray]:
    """Add up a function's results over all chunks, in float64."""
    total: list[np.ndarray] = []
    for chunk in chunks:
        program = _compiled(function, chunk.values.sharding.mesh, rows, tuple(static.items()))  # pyright: ignore[reportAttributeAccessIssue]
        found = [np.asarray(each, np.float64) for each in parallel.settled(program(chunk, *arguments))]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return total


@functools.cache
def _compiled(function: Any, mesh: jax.sharding.Mesh, rows: str, static: tuple[tuple[str, Any], ...]) -> Any:
    """Make a program of (chunk, *arguments) whose sums every device gets; float32 products are not rounded."""

    def program(chunk: Chunk, *arguments: jax.Array) -> Any:
        weight = ((chunk.labels >= 0) & ROWS[rows](chunk.held)).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            return function(chunk.values, chunk.labels, weight, *arguments, **dict(static))

    return jax.jit(program, out_shardings=parallel.replicated(mesh))


# Sums over the rows of a chunk; weight: float32 [m], 1 for rows that count, otherwise 0.


def _totals(values: jax.Array, labels: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
    return weight.sum(), weight @ values


def _squares(values: jax.Array, labels: jax.Array, weight: jax.Array, mean: jax.Array) -> tuple[jax.Array]:
    return (weight @ jnp.square(values - mean[None]),)


def _score(
    values: jax.Array, labels: jax.Array, weight: jax.Array, kernel: jax.Array, bias: jax.Array, unit: bool
) -> tuple[jax.Array, ...]:
    logits = (unit_rows(values) if unit else values) @ kernel + bias[None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return weight @ (logits.argmax(axis=1) == labels).astype(jnp.float32), weight.sum(), weight @ loss


def _logistic(
    values: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    std: jax.Array,
) -> tuple[jax.Array, ...]:
    """Compute the cross-entropy, and its gradients by kernel and bias."""
    x = (values - mean[None]) / std[None]

    def loss(kernel: jax.Array, bias: jax.Array) -> jax.Array:
        logits = x @ kernel + bias[None]
        return weight @ optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))

    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(kernel, bias)
    return value, *slopes


def _products(
    values: jax.Array, labels: jax.Array, weight: jax.Array, mean: jax.Array, std: jax.Array, num_classes: int
) -> tuple[jax.Array, ...]:
    """Compute X' X, X' Y and the sums of Y, for standardised features X and one-hot labels Y."""
    x = (values - mean[None]) / std[None] * weight[:, None]
    y = jax.nn.one_hot(labels, num_classes) * weight[:, None]
    return x.T @ x, x.T @ y, y.sum(axis=0)


def _class_sums(values: jax.Array, labels: jax.Array, weight: jax.Array, num_classes: int) -> tuple[jax.Array]:
    return ((jax.nn.one_hot(labels, num_classes) * weight[:, None]).T @ unit_rows(values),)
