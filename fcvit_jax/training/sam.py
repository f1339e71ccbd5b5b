"""Sharpness-aware minimisation, as a way to estimate the gradient.

The gradient is taken at w + e, where e leads uphill inside a ball of radius rho; the optimizer then steps from w.
g(w) is the gradient of the batch, unit(x) = x / ||x|| over all leaves:

    SAM      arXiv 2010.01412, equations 2 and 3    e = rho unit(g(w)),  estimate g(w + e)
    ASAM     arXiv 2102.11600                       e = rho T unit(T g(w)),  T = |w| + eta or 1, see `SAMConfig`
    GSAM     arXiv 2203.08065, algorithm 1          g(w + e) less alpha times the part of g(w) orthogonal to it
    LookSAM  arXiv 2203.02714, algorithm 1          SAM every k-th step; between, g(w) + alpha ||g(w)|| v, with v the
                                                    unit(part of g(w + e) orthogonal to g(w)) of the last SAM step
    SAM-ON   arXiv 2306.04226                       SAM that perturbs the norms only
    MSAM     arXiv 2401.12033, algorithm 1          g(w + e) alone, e = -rho unit(m), with m the optimizer's momentum
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fcvit_jax.errors import InputError
from fcvit_jax.settings import check_settings, setting
from fcvit_jax.trees import Params, check_float32, dot, leaf_name, orthogonal, unit

LossFn = Callable[[Params, Any, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class SAMConfig:
    """Which gradient to estimate, and where. Raises InputError that names the field.

    ASAM needs about ten times the radius of SAM. Its T is |w| + eta on leaves of two or more axes (kernels, tokens,
    position embeddings), and 1 on the others (biases, norms, LayerScale). The authors' code also has |w| + eta on the
    scales of norms, and 1 on tokens and position embeddings.
    """

    rho: float = setting(0.05, low=0)  # radius; 0: the plain gradient in one pass, bit for bit
    # None: constant; otherwise a cosine from rho to rho_final over the steps from `start`.
    rho_final: float | None = setting(None, low=0)
    start: float = setting(0.0, low=0)  # plain gradients before it; below 1: a share of the run, otherwise a step
    direction: str = setting("gradient", choices=("gradient", "momentum"))  # of the perturbation; momentum: MSAM
    adaptive: bool = False  # ASAM
    eta: float = setting(0.01, low=0)  # ASAM's floor, below which small weights are perturbed like 0
    gap_weight: float = setting(0.0, low=0)  # GSAM's alpha
    refresh_every: int = setting(1, low=1)  # LookSAM's k; 1 is SAM
    reuse_scale: float = setting(0.7, low=0)  # LookSAM's alpha
    microbatches: int = setting(1, low=1)  # strided parts of the batch that are in memory one at a time
    # batch: one perturbation for the whole batch; microbatch: one for each part (m-sharpness).
    scope: str = setting("batch", choices=("batch", "microbatch"))
    perturb: str = setting("all", choices=("all", "kernels", "norms"))

    def __post_init__(self) -> None:
        check_settings(self, "sam.")
        if self.rho_final and not self.rho:
            raise InputError(f"sam.rho_final is {self.rho_final}: it requires a rho above 0, since 0 turns SAM off")
        if self.start > 1 and self.start % 1:
            raise InputError(f"sam.start is {self.start}: a share of the run is below 1, and a step a whole number")
        if self.direction == "momentum":
            own = {field.name: field.default for field in dataclasses.fields(self)}
            for name in ("gap_weight", "refresh_every", "scope"):
                if getattr(self, name) != own[name]:
                    raise InputError(
                        f"sam.{name} is {getattr(self, name)}: it requires the gradient at the parameters, which "
                        f"sam.direction=momentum does not take; leave it at {own[name]}"
                    )


def with_start(cfg: SAMConfig, total_steps: int, earliest: int = 0) -> SAMConfig:
    """Turn `start` into a step, `earliest` or later. Raises InputError if SAM never starts."""
    start = max(cfg.start if cfg.start >= 1 else round(cfg.start * total_steps), earliest)
    if cfg.rho and start >= total_steps:
        raise InputError(f"sam.start is {cfg.start:g}: the run ends after {total_steps} steps, without SAM")
    return dataclasses.replace(cfg, start=float(start))


def warnings(cfg: SAMConfig) -> tuple[str, ...]:
    """Warn about a configuration that runs, but may not be what was meant."""
    lines = []
    if cfg.rho and cfg.perturb == "norms":
        lines.append("sam.perturb is norms: SAM on the norms alone (SAM-ON) may raise sharpness, so measure it")
    if cfg.rho and cfg.scope == "microbatch" and cfg.microbatches == 1:
        lines.append("sam.scope is microbatch, but sam.microbatches is 1: one perturbation for the whole batch")
    return tuple(lines)


class SAMInfo(NamedTuple):
    """Facts about the two passes; float32 scalars. With scope "microbatch", means over the micro-batches.

    A step with one pass (a rho of 0, LookSAM between refreshes, MSAM) has gap 0, cosine 1 and one norm twice. Its rho
    is 0, except for MSAM, whose pass is that at the perturbed parameters.
    """

    loss: jax.Array  # at the parameters; MSAM: at the perturbed ones
    gap: jax.Array  # the loss at the perturbed parameters less `loss`
    grad_norm: jax.Array  # of the gradient at the parameters
    rho: jax.Array  # the radius of this step's perturbation
    adv_grad_norm: jax.Array  # of the gradient at the perturbed parameters
    cosine: jax.Array  # between these two gradients; 0 where one of them vanishes


class SAMState(NamedTuple):
    """The direction that a method keeps: a tree like the parameters, or () if it needs none.

    LookSAM: its unit vector v, zero before the first refresh. MSAM: the optimizer's momentum, set by the caller.
    """

    direction: Params


def init_sam(cfg: SAMConfig, params: Params) -> SAMState:
    """Make the state before the first step."""
    return SAMState(jax.tree.map(jnp.zeros_like, params) if cfg.rho and cfg.refresh_every > 1 else ())


def rho_schedule(cfg: SAMConfig, total_steps: int) -> optax.Schedule:
    """Make the radius at each step: 0 before `start`; then rho, or a cosine from rho to rho_final at total_steps.

    Raises InputError if SAM would never start.
    """
    start = int(with_start(cfg, total_steps).start)
    if not cfg.rho:
        return optax.constant_schedule(0.0)
    share = 1.0 if cfg.rho_final is None else cfg.rho_final / cfg.rho
    falling = optax.cosine_decay_schedule(cfg.rho, total_steps - start, share)
    return optax.join_schedules([optax.constant_schedule(0.0), falling], [start])


def perturb_mask(params: Params, perturb: str, frozen: Params | None = None) -> Params:
    """Mark each leaf that is perturbed; the whole radius is spent on these.

    perturb: "all", "kernels" (leaves of that name) or "norms" (leaves of modules with "norm" in their name).
    frozen: bools, True where a leaf is not trained; such leaves are not perturbed. Raises InputError if none is left.
    """

    def chosen(path: Any, _: Any, is_frozen: bool) -> bool:
        *modules, name = leaf_name(path).split("/")
        of_kind = {"all": True, "kernels": name == "kernel", "norms": any("norm" in m.lower() for m in modules)}
        return of_kind[perturb] and not is_frozen

    frozen = jax.tree.map(lambda _: False, params) if frozen is None else frozen
    mask = jax.tree.map_with_path(chosen, params, frozen)
    if not any(jax.tree.leaves(mask)):
        raise InputError(f"sam.perturb is {perturb!r}: no trained parameter is of that kind, so none is perturbed")
    return mask


def perturbation(
    params: Params, grads: Params, rho: Any, *, mask: Params | None = None, adaptive: bool = False, eta: float = 0.01
) -> Params:
    """Compute e = rho T unit(T g) in float32, zero for a zero gradient; T is 1, or ASAM's if `adaptive`.

    mask: bools, False for leaves that are not perturbed and do not count in the norm. ||e / T|| is rho.
    """
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    scale = jax.tree.map(lambda w: jnp.abs(w) + eta if adaptive and w.ndim > 1 else jnp.ones_like(w), params)
    mask = jax.tree.map(lambda _: True, params) if mask is None else mask
    ascent = jax.tree.map(lambda t, g, m: t * g.astype(t.dtype) if m else jnp.zeros_like(t), scale, grads, mask)
    return jax.tree.map(lambda t, u: jnp.float32(rho) * t * u, scale, unit(ascent))


def sam_value_and_grad(loss_fn: LossFn, cfg: SAMConfig, mask: Params | None = None) -> Callable[..., Any]:
    """Make a function like `jax.value_and_grad(loss_fn, has_aux=True)`, with SAM's gradient. Call it under jit.

    loss_fn: (params, batch, key) -> (loss, aux); the loss is the mean over the rows of the batch. Weights of rows
        (padding, masks) must average to 1 over the *whole* batch: then mean(weight * loss of the row) is the same for
        any number of micro-batches. Put parameters that are not trained under `stop_gradient` there; otherwise their
        gradients count in the norms of GSAM and LookSAM.
    mask: from `perturb_mask`; None: that of cfg.perturb, with nothing frozen.

    Returns (params, batch, key, rho, step, state) -> ((loss, aux), grads, state, SAMInfo).

    params: float32, otherwise InputError.
    batch: arrays with a leading axis of B rows, a multiple of `microbatches` (otherwise InputError), ideally of
        `microbatches` times the devices. Micro-batch i of c holds the rows i, i + c ... and key i of
        `jax.random.split(key, c)`, in both passes.
    rho: from `rho_schedule`. Before cfg.start use `jax.value_and_grad`, which costs half: only a cfg.rho of 0, and
        LookSAM, leave the second pass out. LookSAM refreshes at cfg.start and every k steps after it.
    state: from `init_sam`, or from the previous call. For MSAM pass `SAMState(momentum)`; () is returned.

    Loss and aux are those at the parameters, except for MSAM. With micro-batches, leaves of aux with a leading axis of
    B / c are joined to B rows in the batch's order; all others are averaged.
    """
    if 0 < cfg.start < 1:
        raise InputError(f"sam.start is {cfg.start}, a share of the run: replace it by a step, see `with_start`")
    # jit: both passes and the scans' shape inference share one trace.
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    parts = {"batch": 1, "microbatch": 1} | {cfg.scope: cfg.microbatches}
    looks = cfg.rho > 0 and cfg.refresh_every > 1
    along_momentum = cfg.rho > 0 and cfg.direction == "momentum"

    def of_part(params: Params, batch: Any, key: jax.Array) -> tuple[tuple[jax.Array, Params], Any]:
        (loss, aux), grads = value_and_grad(params, batch, key)
        return (loss.astype(jnp.float32), grads), aux

    gradient = _averaged(of_part, parts["batch"])

    def function(params: Params, batch: Any, key: jax.Array, rho: Any, step: Any, state: SAMState) -> Any:
        rho = jnp.asarray(rho, jnp.float32)
        sharp = (rho > 0) & ((step - int(cfg.start)) % cfg.refresh_every == 0)  # this step has a second pass

        def perturbed(params: Params, direction: Params, radius: jax.Array) -> Params:
            check_float32(params, "stored parameters must be float32, otherwise rounding undoes SAM")
            leaves = perturb_mask(params, cfg.perturb) if mask is None else mask
            away = perturbation(params, direction, radius, mask=leaves, adaptive=cfg.adaptive, eta=cfg.eta)
            return optax.tree.add(params, away)

        def estimate(params: Params, batch: Any, key: jax.Array) -> tuple[tuple[Params, Params, SAMInfo], Any]:
            at = perturbed(params, state.direction, -rho) if along_momentum else params
            (loss, clean), aux = gradient(at, batch, key)
            length, zero = optax.tree.norm(clean), jnp.float32(0)

            def plain() -> tuple[Params, SAMInfo]:
                radius = rho if along_momentum else zero
                return clean, SAMInfo(loss, zero, length, radius, length, jnp.float32(1))

            def adversarial() -> tuple[Params, SAMInfo]:
                (adv_loss, adv), _ = gradient(perturbed(params, clean, rho), batch, key)
                info = SAMInfo(loss, adv_loss - loss, length, rho, optax.tree.norm(adv), dot(unit(clean), unit(adv)))
                if cfg.gap_weight:
                    adv = optax.tree.add_scale(adv, -cfg.gap_weight, orthogonal(clean, adv))
                return adv, info

            if looks:
                grads, info = jax.lax.cond(sharp, adversarial, plain)
            else:  # a conditional would hinder the compiler
                grads, info = adversarial() if cfg.rho and not along_momentum else plain()
            return (grads, clean if looks else (), info), aux

        (grads, clean, info), aux = _averaged(estimate, parts["microbatch"])(params, batch, key)
        if looks:
            grads, state = jax.lax.cond(sharp, partial(_refresh, grads, clean), partial(_reuse, cfg, clean, rho, state))
        return (info.loss, aux), grads, SAMState(()) if along_momentum else state, info

    return function


def _refresh(grads: Params, clean: Params) -> tuple[Params, SAMState]:
    """Take a step of LookSAM with a second pass: its direction comes from all leaves together."""
    across = orthogonal(grads, clean)
    # Without curvature only rounding is left, which must not become a vector of length 1.
    real = optax.tree.norm(across) > 1e-5 * optax.tree.norm(grads)
    return grads, SAMState(jax.tree.map(lambda u: jnp.where(real, u, 0.0), unit(across)))


def _reuse(cfg: SAMConfig, clean: Params, rho: jax.Array, state: SAMState) -> tuple[Params, SAMState]:
    """Take a step of LookSAM without a second pass; the plain gradient if the schedule has rho at 0."""
    length = jnp.where(rho > 0, cfg.reuse_scale, 0.0) * optax.tree.norm(clean)
    return optax.tree.add_scale(clean, length, state.direction), state


def _averaged(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Average a function (params, batch, key) -> (averaged, aux) over micro-batches: see `sam_value_and_grad`."""

    def average(params: Params, batch: Any, key: jax.Array) -> Any:
        size = jax.tree.leaves(batch)[0].shape[0]
        if size % count:
            raise InputError(f"sam.microbatches is {count}: a batch of {size} rows does not divide by it")
        # Strided: contiguous parts of a batch that lies on several devices would be gathered on each of them.
        chunks = jax.tree.map(lambda x: x.reshape(size // count, count, *x.shape[1:]).swapaxes(0, 1), batch)
        chunks = chunks, jax.random.split(key, count)

        def add(total: Any, chunk: Any) -> tuple[Any, Any]:
            means, aux = function(params, *chunk)
            return optax.tree.add(total, means), aux

        def join(stacked: jax.Array) -> jax.Array:
            if stacked.shape[1:2] == (size // count,):
                return stacked.swapaxes(0, 1).reshape(size, *stacked.shape[2:])
            return stacked.mean(axis=0)

        shapes, _ = jax.eval_shape(function, params, *jax.tree.map(lambda x: x[0], chunks))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, aux = jax.lax.scan(add, zeros, chunks)
        return jax.tree.map(lambda x: x / count, total), jax.tree.map(join, aux)

    return average if count > 1 else function
