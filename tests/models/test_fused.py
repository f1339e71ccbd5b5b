"""The fused programs for NVIDIA GPUs against float64 and the plain block; interpreted without a GPU."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import fcvit_jax as fc
from attention_oracle import by_numpy, draw, float64
from fcvit_jax.compiling import on_each_device
from fcvit_jax.models import fused_kernels
from fcvit_jax.models.config import Rotary
from fcvit_jax.models.fused import choose_kernels
from fcvit_jax.models.fused_kernels import Affine
from fcvit_jax.models.fused_matching import match
from fcvit_jax.models.rules import Attended, Layer, Nearest, Rule, ToMe, match_tokens
from fcvit_jax.parallel import batched, data_mesh, replicated

# On a GPU the programs themselves; without one they are interpreted.
INTERPRET = jax.default_backend() != "gpu"


def in_one(*parts):
    """Stack parts [b, h, n, k] into [b, n, parts, h, k]."""
    return jnp.stack(parts, axis=2).transpose(0, 3, 2, 1, 4)


def norm_by_numpy(x, scale, bias):
    x = float64(x)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * float64(scale) + float64(bias)


# Less than a tile of keys, one and a few, two; a head whose width is not a power of two.
@pytest.mark.parametrize(("tokens", "width"), [(11, 16), (77, 16), (128, 32), (130, 20), (33, 8)])
@pytest.mark.parametrize("proportional", [True, False])
def test_triton_attention_equals_float64(tokens, width, proportional):
    q, k, v, size = draw(tokens, tokens, jnp.bfloat16, width=width)
    size = size if proportional else None
    found = fused_kernels.attend(in_one(q, k, v), size, INTERPRET)
    np.testing.assert_allclose(float64(found), by_numpy(q, k, v, size).transpose(0, 2, 1, 3), atol=0.03)


@pytest.mark.parametrize(
    ("layer", "prefix", "width"),
    [
        (Layer(197, 184, 13), 1, 16),
        (Layer(34, 20, 14), 2, 20),
        (Layer(6, 4, 2), 0, 8),
        (Layer(11, 9, 2), 5, 8),
        (Layer(33, 17, 4, 4, ((4, 8), (2, 2))), 1, 16),
        (Layer(33, 29, 1, 4), 1, 16),
        (Layer(32, 24, 2, 4, ((4, 8), (2, 2))), 0, 16),
        (Layer(34, 26, 2, 4, ((4, 8), (2, 2))), 2, 16),
        (Layer(300, 250, 50), 1, 8),  # too many for one program
    ],
)
@pytest.mark.parametrize("rule", [ToMe(), Nearest(), Nearest(features=0.0, checkerboard=False, keep_norm=False)])
def test_triton_matches_as_xla(layer, prefix, width, rule):
    patches = (layer.tokens_in - prefix) // (layer.windows or 1)
    layer = layer._replace(rule=rule, grid=(2, patches // 2) if patches % 2 == 0 else (1, patches))
    qkv = jax.random.normal(jax.random.key(7), (3, layer.tokens_in, 3, 3, width)).astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(9), (3, layer.tokens_in, 3 * width)).astype(jnp.bfloat16)
    size = jax.random.randint(jax.random.key(8), (3, layer.tokens_in), 1, 5).astype(jnp.float32)
    found = match(qkv, x, size, layer, prefix, interpret=INTERPRET)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    expected = rule(Attended(x, q, k, v, size), x, size, layer, prefix)
    assert found.keep_norm == expected.keep_norm
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layer", [Layer(33, 25, 8), Layer(33, 17, 4, 4, ((4, 8), (2, 2)))])
def test_triton_matches_each_token_once_whatever_the_keys_are(layer):
    keys = jax.random.normal(jax.random.key(8), (3, 33, 3, 3, 16)).astype(jnp.bfloat16)
    size, damaged = jnp.ones((3, 33)), keys.at[1, 5:9].set(jnp.nan).at[1, 11].set(jnp.inf)
    expected, equal, found = (
        match(each, each[:, :, 0].reshape(3, 33, -1), size, layer, 1, interpret=INTERPRET)
        for each in (keys, jnp.ones_like(keys), damaged)
    )
    for matching in (equal, found):
        assert matching.order is not None
        assert (np.sort(matching.order) == np.arange(33)).all()
        goals = np.take_along_axis(np.asarray(matching.target), np.asarray(matching.order), axis=1)
        assert (goals[:, : layer.tokens_out] == np.arange(layer.tokens_out)).all()
        assert goals.max() < layer.tokens_out
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours[::2], theirs[::2])
    for ours, theirs in zip(*map(jax.tree.leaves, (equal, match_tokens(jnp.ones((3, 33, 4)), layer, 1))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(2, 77, 48), (1, 5, 64), (3, 1, 384)])
@pytest.mark.parametrize("with_branch", [True, False])
def test_triton_adds_and_norms(shape, with_branch):
    keys = jax.random.split(jax.random.key(1), 4)
    x, branch = (3 * jax.random.normal(key, shape).astype(jnp.bfloat16) + 1 for key in keys[:2])
    scale, bias = (jax.random.normal(key, shape[-1:]) for key in keys[2:])
    total, normed = fused_kernels.add_and_norm(x, branch if with_branch else None, Affine(scale, bias, 1e-6), INTERPRET)
    np.testing.assert_array_equal(total, x + branch if with_branch else x)
    np.testing.assert_allclose(float64(normed), norm_by_numpy(total, scale, bias), atol=0.04)


# 8 rows a tile at width 384, otherwise all in one.
@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize(
    ("layer", "d"),
    [
        (Layer(77, 57, 20), 48),
        (Layer(33, 17, 4, 4, ((4, 8), (2, 2))), 48),
        (Layer(65, 33, 32), 48),
        (Layer(33, 25, 8), 384),
        (Layer(33, 21, 3, 4, ((4, 8), (2, 2))), 384),
    ],
)
def test_triton_merges_and_norms(layer, d, keep_norm):
    keys = jax.random.split(jax.random.key(2), 6)
    n, t = layer.tokens_in, layer.tokens_out
    x, branch = (3 * jax.random.normal(key, (2, n, d)).astype(jnp.bfloat16) for key in keys[:2])
    scale, bias = (jax.random.normal(key, (d,)) for key in keys[2:4])
    size = jax.random.randint(keys[4], (2, n), 1, 40).astype(jnp.float32)
    matching = match_tokens(jax.random.normal(keys[5], (2, n, 8)), layer, 1)
    matching = dataclasses.replace(matching, keep_norm=keep_norm)
    assert matching.order is not None
    merged, normed, sizes = fused_kernels.merge_and_norm(
        x, branch, size, matching, Affine(scale, bias, 1e-6), INTERPRET
    )

    # One by one, by the target.
    expected, expected_size, norms = np.zeros((2, t, d)), np.zeros((2, t)), np.zeros((2, t))
    for image in range(2):
        for token in range(n):
            weight, slot = float(size[image, token]), int(matching.target[image, token])
            expected[image, slot] += weight * float64((x + branch)[image, token])
            expected_size[image, slot] += weight
            norms[image, slot] += weight * np.linalg.norm(float64((x + branch)[image, token]))
    np.testing.assert_array_equal(sizes, expected_size)
    if keep_norm:
        expected *= (norms / np.linalg.norm(expected, axis=-1))[..., None]
    np.testing.assert_allclose(float64(merged), expected / expected_size[..., None], atol=0.07)
    np.testing.assert_allclose(float64(normed), norm_by_numpy(merged, scale, bias), atol=0.04)
    # A token that nothing is merged into keeps its value, except for the rounding of the sum.
    tokens, target, moved = x + branch, np.asarray(matching.target), np.ones((2, n), bool)
    np.put_along_axis(moved, np.asarray(matching.order[:, :t]), False, axis=1)
    for image in range(2):
        alone = [i for i in range(n) if not moved[image, i] and target[image, i] not in target[image, moved[image]]]
        np.testing.assert_allclose(
            float64(merged[image, target[image, alone]]), float64(tokens[image, alone]), rtol=2**-7
        )


@pytest.mark.parametrize("schedule", ["dense", "tome_r5", "s1winc2_r8", "s1winc2_r8@nearest"])
def test_a_model_computes_the_same_with_both_kernels(schedule):
    config = fc.ViTConfig((64, 64), 8, 64, 4, 4, 128, num_classes=5)
    merges = fc.MergeSchedule.parse(schedule, 4)
    images = jax.random.normal(jax.random.key(3), (3, 64, 64, 3))
    params: Any = jax.jit(fc.ViT(config).init)(jax.random.key(4), images)["params"]
    # As large as a trained model's: a new head is zero.
    params["head"]["kernel"] = jax.random.normal(jax.random.key(5), params["head"]["kernel"].shape)
    plain, ours = (
        jax.jit(fc.ViT(config, merges, dtype=jnp.bfloat16, kernels=kernels).apply)({"params": params}, images)[0]
        for kernels in ("xla", "interpreted" if INTERPRET else "triton")
    )
    assert float(jnp.abs(plain).max()) > 1
    np.testing.assert_allclose(plain, ours, atol=0.1 * float(plain.std()))


def lower_for_an_h200(call, *arguments):
    device = AbstractDevice("NVIDIA H200", 132, "gpu")  # JAX 0.11 asks which GPU it is
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return call.trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("layer", "width", "programs"),
    [
        (Layer(197, 184, 13), 64, 4),
        (Layer(197, 181, 4, 4, ((14, 14), (2, 2))), 64, 4),
        (Layer(50, 42, 8), 80, 4),  # less than a tile; heads whose width is not a power of two
        (Layer(189, 181, 8), 64, 4),  # the last tile as large as the others
        (Layer(197, 184, 13, rule=Nearest(), grid=(14, 14)), 64, 4),
        (Layer(577, 561, 16), 64, 3),  # matched by XLA
    ],
)
def test_programs_for_nvidia_gpus_are_lowered_on_any_machine(layer, width, programs):
    """The result is Triton's intermediate language; the steps after it need a GPU."""
    n = layer.tokens_in
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, n, 3, 6, width), (2, n, 384))]
    size, vector = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, n), (384,)))

    def everything(qkv, x, size, scale):
        norm = Affine(scale, scale, 1e-6)
        x, normed = fused_kernels.add_and_norm(x, x, norm)
        y = fused_kernels.attend(qkv, size)
        return y, normed, fused_kernels.merge_and_norm(x, x, size, match(qkv, x, size, layer, 1), norm)

    lowered = lower_for_an_h200(jax.jit(everything), *shapes, size, vector)
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == programs


def test_each_of_several_devices_runs_tritons_programs_on_its_own_images():
    config = fc.ViTConfig((32, 32), 8, 32, 2, 2, 64, num_classes=5)
    schedule = fc.MergeSchedule.parse("tome_r3", 2)
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3), jnp.bfloat16)
    params = jax.jit(fc.ViT(config).init)(jax.random.key(1), images.astype(jnp.float32))["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), (32, 5))

    def program(kernels, count):
        model = fc.ViT(config, schedule, dtype=jnp.bfloat16, kernels=kernels)
        mesh = data_mesh(jax.devices()[:count])
        call = on_each_device(lambda params, images: model.apply({"params": params}, images)[0], 17, mesh)
        return jax.jit(call), (jax.device_put(params, replicated(mesh)), jax.device_put(images, batched(mesh)))

    count = min(2, jax.device_count())
    (one, here), (several, spread) = (program("interpreted" if INTERPRET else "triton", each) for each in (1, count))
    np.testing.assert_allclose(several(*spread), one(*here), atol=1e-5)
    if jax.__version_info__ >= (0, 11) and jax.default_backend() != "gpu":
        pytest.skip("both agree; this JAX lowers Triton's programs in a mesh of GPUs only")
    call, arguments = program("triton", count)
    text = lower_for_an_h200(call, *arguments).as_text()
    attending = re.findall(r"__gpu\$xla.gpu.triton.*name = \"attend\".*-> tensor<(\w+)>", text)
    assert set(attending) == {f"{4 // count}x{tokens}x2x16xbf16" for tokens in (17, 14)}


@dataclasses.dataclass(frozen=True)
class Reversed(Rule):
    """A rule without a fused program."""

    def __call__(self, attended, x, size, layer, prefix):
        return match_tokens(-x, layer, prefix)


def test_kernels_that_cannot_compute_a_model_are_refused():
    config, images = fc.ViTConfig((32, 32), 8, 32, 2, 2, 64, num_classes=5), jnp.zeros((1, 32, 32, 3))
    with pytest.raises(fc.InputError, match="kernels is 'flash': choose one of xla, triton, interpreted"):
        fc.ViT(config, kernels="flash").init(jax.random.key(0), images)
    told = "kernels is 'triton': it is for inference in bfloat16 only; choose 'xla'"
    with pytest.raises(fc.InputError, match=told):
        fc.ViT(config, kernels="triton").init(jax.random.key(0), images)
    with pytest.raises(fc.InputError, match=told):
        fc.ViT(config, kernels="triton", dtype=jnp.bfloat16).init(jax.random.key(0), images, train=True)
    schedule = fc.MergeSchedule((fc.Global(2, 3, Reversed()),))
    with pytest.raises(fc.InputError, match="it has no program for the merge rule Reversed; choose 'xla'"):
        fc.ViT(config, schedule, kernels="triton", dtype=jnp.bfloat16).init(jax.random.key(0), images)


def test_triton_is_chosen_for_new_gpus_in_bfloat16():
    class Device:
        def __init__(self, platform, capability):
            self.platform, self.compute_capability = platform, capability

    new, old, amd = Device("gpu", "9.0"), Device("gpu", "7.5"), Device("gpu", "gfx90a:sramecc+")
    merging = fc.MergeSchedule((fc.Dense(1), fc.Global(1, 3)))
    own = fc.MergeSchedule((fc.Global(1, 3), fc.Global(1, 3, Reversed())))

    def chosen(dtype, *devices, schedule=merging, config=None):
        return choose_kernels(dtype, devices, schedule, config or fc.ViTConfig())

    assert chosen(jnp.bfloat16, new) == "triton"
    assert chosen(jnp.bfloat16, new, schedule=own) == "xla"
    assert chosen(jnp.bfloat16, new, config=fc.ViTConfig(gated=True, key_bias=False, pool="map")) == "triton"
    assert chosen(jnp.bfloat16, new, config=fc.ViTConfig(rotary=Rotary())) == "xla"
    assert chosen(jnp.bfloat16, new, config=fc.ViTConfig(attn_norm=True)) == "xla"
    assert chosen(jnp.float32, new) == "xla"
    assert chosen(jnp.bfloat16, new, new) == "triton"
    assert chosen(jnp.bfloat16, new, old) == "xla"
    assert chosen(jnp.bfloat16, old) == "xla"
    assert chosen(jnp.bfloat16, amd) == "xla"
    assert chosen(jnp.bfloat16, *jax.devices("cpu")) == "xla"
