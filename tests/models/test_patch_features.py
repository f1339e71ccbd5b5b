"""Features of patches, against the tokens that the model returns."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.checkpoint import abstract_params

TINY = fc.ViTConfig((32, 48), 8, 24, 4, 3, 48, num_classes=0, num_registers=2)


def random_params(config):
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config))
    rng = np.random.default_rng(1)
    draw = lambda path, leaf: (path[-1].key == "scale") + 0.2 * rng.standard_normal(leaf.shape)  # noqa: E731
    return tree.unflatten([np.asarray(draw(path, leaf), np.float32) for path, leaf in leaves])


def features(schedule, config=TINY, **options):
    model = fc.ViT(config, fc.MergeSchedule.parse(schedule, 4))
    params = random_params(config)
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 3))
    found = jax.jit(partial(fc.patch_features, model, **options))(params, images)
    return found, jax.jit(model.apply)({"params": params}, images)[1]


def test_nothing_merged_equals_dense():
    dense, none = features("dense")[0], features("tome_r0")[0]
    np.testing.assert_array_equal(dense.patches, none.patches)
    assert dense.patches.shape == (2, 4, 6, 24)
    assert dense.prefix.shape == (2, 3, 24)
    assert not dense.pruned.any()


@pytest.mark.parametrize("schedule", ["tome_r4", "local:2:r4:w2x2,global:2:r3", "tome_r3@evit"])
def test_each_patch_has_the_value_of_its_token(schedule):
    found, out = features(schedule)
    tokens, source = np.asarray(out["tokens"]), np.asarray(out["source"])
    for image in range(2):
        for patch in range(24):
            value = tokens[image, source[image, patch]]
            np.testing.assert_allclose(found.patches[image, patch // 6, patch % 6], value, atol=1e-6)
    np.testing.assert_allclose(found.prefix, tokens[:, :3], atol=1e-6)
    np.testing.assert_array_equal(found.pruned.reshape(2, -1), out["pruned"])
    assert bool(found.pruned.any()) == ("evit" in schedule)


def test_chosen_layers_with_and_without_the_last_norm():
    (second, last), out = features("tome_r4", layers=(1, -1), norm=False)
    for found, layer in ((second, out["layers"][1]), (last, out["layers"][3])):
        raw = np.asarray(fc.unmerge_tokens(layer["tokens"], layer["source"])).reshape(2, 4, 6, 24)
        np.testing.assert_allclose(found.patches, raw, atol=1e-6)
    (normed,), _ = features("tome_r4", layers=[1])
    params = random_params(TINY)["norm"]
    raw = np.asarray(second.patches, np.float64)
    scaled = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed.patches, scaled * params["scale"] + params["bias"], atol=1e-5)


def test_a_norm_after_the_pooling_is_left_out():
    config = replace(TINY, pool="avg", fc_norm=True)
    found, out = features("dense", config)
    np.testing.assert_allclose(found.patches.reshape(2, 24, 24), out["tokens"][:, 3:], atol=1e-6)


def test_a_layer_that_does_not_exist():
    with pytest.raises(fc.InputError, match=r"layer 4: the model has layers 0 to 3"):
        features("dense", layers=(0, 4))
