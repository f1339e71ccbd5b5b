from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.merging import unmerge_tokens
from fcvit_jax.models.schedule import Global, Local, MergeSchedule
from fcvit_jax.models.vit import ViT, cast_params

TINY = ViTConfig(image_size=(32, 48), patch_size=8, embed_dim=24, depth=4, num_heads=3, mlp_dim=48, num_classes=7)


def images(config, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, *config.image_size, 3))


def random_params(config, seed=1):
    """Draw parameters as large as a trained model's: fresh heads are zero, and LayerScale nearly."""
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config))
    rng = np.random.default_rng(seed)
    draw = lambda path, leaf: (path[-1].key == "scale") + 0.2 * rng.standard_normal(leaf.shape)  # noqa: E731
    return tree.unflatten([jnp.asarray(draw(path, leaf), jnp.float32) for path, leaf in leaves])


def apply(config, schedule=None, params=None, **fields):
    model = ViT(config, schedule and MergeSchedule.parse(schedule, config.depth), **fields)
    return jax.jit(model.apply)({"params": params or random_params(config)}, images(config))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_registers": 3, "no_embed_class": True},
        {"dist_token": True, "pool": "dist_avg"},
        {"layer_scale": 0.1, "no_embed_class": True},
        {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5, "gelu": "quick"},
        {"qkv_bias": False, "gelu": "tanh", "pool": "avg", "fc_norm": True},
        {"class_token": False, "pool": "avg", "num_classes": 0},
    ],
)
def test_shapes_and_bookkeeping_of_every_variant(fields):
    config = replace(TINY, **fields)
    schedule = MergeSchedule((Local(2, 6, (2, 3)), Global(2, 5)))
    logits, out = apply(config, str(schedule))
    prefix = config.num_prefix_tokens
    assert logits.shape == (2, config.num_classes or config.embed_dim)
    assert logits.dtype == jnp.float32
    assert out["embedded"].shape == (2, prefix + 24, 24)
    assert [layer["tokens"].shape[1] for layer in out["layers"]] == list(schedule.tokens(config))
    for layer in out["layers"]:
        np.testing.assert_allclose(layer["size"][:, :prefix], 1.0)
        np.testing.assert_allclose(layer["size"].sum(1), prefix + 24)
        counted = np.stack([np.bincount(row, minlength=layer["size"].shape[1]) for row in np.asarray(layer["source"])])
        np.testing.assert_array_equal(counted[:, prefix:], np.asarray(layer["size"])[:, prefix:])
    assert unmerge_tokens(out["tokens"], out["source"]).shape == (2, 24, 24)


@pytest.mark.parametrize(
    "fields", [{}, {"dist_token": True, "pool": "dist_avg"}, {"layer_scale": 0.5, "fc_norm": True}]
)
@pytest.mark.parametrize("schedule", ["dense", "tome_r4"])
def test_the_pooled_tokens_alone_give_what_all_tokens_give(fields, schedule):
    config = replace(TINY, **fields)
    params = random_params(config)
    logits, out = apply(config, schedule, params)
    params = jax.tree.map(np.asarray, params)
    tokens = np.asarray(out["tokens"])[:, : config.pooled_tokens]
    if config.fc_norm:
        tokens = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + config.norm_eps)
        tokens = tokens * params["norm"]["scale"] + params["norm"]["bias"]
    heads = [params["head"], params["head_dist"]] if config.dist_token else [params["head"]]
    by_hand = [tokens[:, place] @ head["kernel"] + head["bias"] for place, head in enumerate(heads)]
    np.testing.assert_allclose(logits, sum(by_hand) / len(heads), atol=1e-4)


@pytest.mark.parametrize("schedule", ["tome_r0", "s2dfe_r0", "s2winc3_r0", "local:4:r0:w2x2"])
def test_r_zero_is_the_dense_model_bit_for_bit(schedule):
    params = random_params(TINY)
    np.testing.assert_array_equal(apply(TINY, schedule, params)[0], apply(TINY, None, params)[0])


def test_merging_of_identical_patches_changes_nothing():
    # With proportional attention, one token of size s attracts as much as s equal tokens. If all patches are alike,
    # without positions, the class token sees the same whatever merges.
    config = replace(TINY, no_embed_class=True)
    params = random_params(config)
    params["embed"]["pos_embed"] *= 0
    pixels = jnp.ones((1, *config.image_size, 3))
    run = lambda config, text: (  # noqa: E731
        jax.jit(ViT(config, MergeSchedule.parse(text, 4)).apply)({"params": params}, pixels)[0]
    )
    dense = run(config, "dense")
    np.testing.assert_allclose(run(config, "tome_r5"), dense, atol=2e-5)
    np.testing.assert_allclose(run(config, "s1winc2_r8"), dense, atol=2e-5)
    plain = replace(config, proportional_attention=False)
    assert np.abs(run(plain, "tome_r5") - dense).max() > 1e-2


def test_average_pooling_counts_every_patch_once():
    config = replace(TINY, pool="avg", num_classes=0, fc_norm=False)
    _, out = apply(config, "tome_r5")
    everywhere = unmerge_tokens(out["tokens"], out["source"])
    np.testing.assert_allclose(out["pooled"], everywhere.mean(axis=1), atol=1e-5)


def test_distilled_logits_are_the_mean_of_two_heads():
    logits, out = apply(replace(TINY, dist_token=True, pool="dist_avg"), "tome_r3")
    assert out["head_logits"].shape == (2, 2, 7)
    np.testing.assert_allclose(logits, out["head_logits"].mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("schedule", [None, "s2dfe_r6", "s1winc2_r8"])
def test_bfloat16_stays_near_float32_with_float32_logits(schedule):
    params = random_params(TINY)
    full, low = apply(TINY, schedule, params)[0], apply(TINY, schedule, params, dtype=jnp.bfloat16)[0]
    assert low.dtype == jnp.float32
    # If bfloat16 flips a match, the logits move; the dense model only rounds.
    assert np.abs(full - low).max() < (0.15 if schedule is None else 1.5)
    assert not np.array_equal(full, low)


@pytest.mark.parametrize(
    "fields", [{}, {"layer_scale": 0.1, "pre_norm": True}, {"dist_token": True, "pool": "dist_avg"}]
)
def test_parameters_cast_beforehand_give_the_same_bit_for_bit(fields):
    config = replace(TINY, **fields)
    params = random_params(config)
    cast = cast_params(params, jnp.bfloat16)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(cast)}
    assert kinds == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    assert cast["norm"]["scale"] is params["norm"]["scale"]
    plain, ours = (apply(config, "tome_r5", p, dtype=jnp.bfloat16)[0] for p in (params, cast))
    np.testing.assert_array_equal(plain, ours)


def test_remat_gives_the_same_gradient():
    params = random_params(TINY)
    schedule = MergeSchedule.parse("s1winc2_r8", 4)

    def gradient(remat):
        loss = lambda params: (  # noqa: E731
            ViT(TINY, schedule, remat=remat).apply({"params": params}, images(TINY))[0] ** 2
        ).sum()
        return jax.jit(jax.grad(loss))(params)

    plain, saved = gradient(False), gradient(True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))
    assert np.abs(plain["embed"]["kernel"]).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, saved)


def test_dropout_and_stochastic_depth_act_in_training_only():
    params = random_params(TINY)
    model = ViT(TINY, dropout=0.3, drop_path=0.5)
    apply_jit = jax.jit(model.apply, static_argnames="train")
    run = lambda seed, train: apply_jit(  # noqa: E731
        {"params": params}, images(TINY), train=train, rngs={"dropout": jax.random.key(seed)}
    )[0]
    np.testing.assert_allclose(run(0, False), apply(TINY, None, params)[0], atol=1e-5)
    np.testing.assert_array_equal(run(0, True), run(0, True))
    assert not np.allclose(run(0, True), run(1, True))


def test_stochastic_depth_drops_whole_branches_of_single_images():
    # Rate 1 in the last layer always drops its branches.
    config = replace(TINY, depth=2)
    params = random_params(config)
    model = ViT(config, drop_path=1.0)
    _, out = model.apply({"params": params}, images(config), train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(out["layers"][1]["tokens"], out["layers"][0]["tokens"])


def test_jit_prunes_what_is_not_used():
    model = ViT(TINY, MergeSchedule.parse("tome_r5", 4))
    arguments = {"params": random_params(TINY)}, images(TINY)
    program = lambda f: str(jax.jit(f).lower(*arguments).compile().as_text())  # noqa: E731
    source_map = f"s32[{len(images(TINY))},{TINY.num_patches}]"
    assert source_map not in program(lambda *a: model.apply(*a)[0])
    assert source_map in program(lambda *a: model.apply(*a)[1]["source"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "embed_dim 24 does not divide into 5 heads"),
        ({"patch_size": 7}, "image_size 32x48 does not divide into patches of 7"),
        ({"gelu": "relu"}, "gelu is 'relu'"),
        ({"pool": "max"}, "pool is 'max'"),
        ({"pool": "dist_avg"}, "needs a distillation token"),
        ({"class_token": False}, "needs a class token"),
        ({"class_token": False, "dist_token": True, "pool": "dist_avg"}, "needs a class token"),
        ({"depth": 0}, "depth is 0"),
        ({"image_size": (0, 8)}, "image_size is"),
    ],
)
def test_contradictions_in_a_configuration_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        replace(TINY, **fields)


def test_configuration_round_trips_through_json_and_is_strict():
    assert ViTConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(InputError, match="depths"):
        ViTConfig.from_dict(TINY.to_dict() | {"depths": 3})
    fields = TINY.to_dict()
    del fields["gelu"]
    with pytest.raises(InputError, match="gelu"):
        ViTConfig.from_dict(fields)


def test_images_of_another_size_are_refused():
    with pytest.raises(InputError, match=r"\[batch, 32, 48, 3\]"):
        ViT(TINY).apply({"params": random_params(TINY)}, jnp.zeros((1, 48, 32, 3)))
