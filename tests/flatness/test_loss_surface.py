import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.flatness.loss_surface import LossSurface, filter_normalised, loss_slice
from fcvit_jax.trees import random_like

KEY = jax.random.key(2)


def test_filters_are_as_long_as_the_weights_own():
    rng = np.random.default_rng(0)
    dense, conv = (rng.normal(size=size).astype(np.float32) for size in ((5, 3), (2, 2, 3, 4)))
    dense[:, 1] = 0
    params = {
        "embed": {"proj": {"kernel": jnp.asarray(conv), "bias": jnp.ones(4)}, "pos_embed": jnp.ones((1, 6, 4))},
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
        "head": {"kernel": jnp.asarray(dense), "bias": jnp.ones(3)},
        "ls1": jnp.ones(3),
    }
    direction, raw = filter_normalised(params, KEY), random_like(params, KEY)

    # By hand: the columns of a Dense kernel [in, out]; all but the last axis of a convolution [height, width, in, out].
    drawn = np.asarray(raw["head"]["kernel"])
    for column in range(3):
        wanted = drawn[:, column] / np.linalg.norm(drawn[:, column]) * np.linalg.norm(dense[:, column])
        np.testing.assert_allclose(direction["head"]["kernel"][:, column], wanted, rtol=1e-5, atol=1e-7)
    drawn = np.asarray(raw["embed"]["proj"]["kernel"])
    for output in range(4):
        wanted = drawn[..., output] / np.linalg.norm(drawn[..., output]) * np.linalg.norm(conv[..., output])
        np.testing.assert_allclose(direction["embed"]["proj"]["kernel"][..., output], wanted, rtol=1e-5, atol=1e-7)
    assert not direction["head"]["kernel"][:, 1].any()
    for leaf in (
        direction["embed"]["proj"]["bias"],
        direction["embed"]["pos_embed"],
        direction["norm"]["scale"],
        direction["norm"]["bias"],
        direction["head"]["bias"],
        direction["ls1"],
    ):
        assert not leaf.any()


def test_rescaled_filters_give_the_same_slice():
    # The purpose of filter normalisation: the first layer times 4 and the second over 4 give the same line.
    def loss(params, batch):
        return jnp.square(jax.nn.relu(batch @ params["a"]["kernel"]) @ params["b"]["kernel"] - 1).mean(), jnp.float32(0)

    rng = np.random.default_rng(1)
    params = {name: {"kernel": jnp.float32(rng.normal(size=shape))} for name, shape in (("a", (4, 8)), ("b", (8, 2)))}
    batches = [jnp.float32(rng.normal(size=(6, 4))) for _ in range(2)]
    other = {"a": {"kernel": 4 * params["a"]["kernel"]}, "b": {"kernel": params["b"]["kernel"] / 4}}
    points = np.array([[-1.0, 0.0], [0.5, 0.5], [1.0, -1.0]])
    lines = []
    for each in (params, other):
        first, second = (filter_normalised(each, key) for key in jax.random.split(KEY))
        lines.append(loss_slice(LossSurface(loss, each, batches), first, second, points))
    np.testing.assert_allclose(*lines, rtol=1e-4)


def test_the_loss_at_each_point_is_the_mean_over_the_batches():
    def loss(params, batch):
        return batch * jnp.sum(params["w"]), jnp.float32(0)

    params, first, second = ({"w": jnp.float32(x)} for x in ([1.0, 2.0], [1.0, 0.0], [0.0, 10.0]))
    points = np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.5]])
    losses = loss_slice(LossSurface(loss, params, [jnp.float32(1), jnp.float32(3)]), first, second, points)
    np.testing.assert_allclose(losses, [6.0, 8.0, 14.0])
