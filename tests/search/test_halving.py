"""fcvit_jax.search.halving."""

from fcvit_jax.search.halving import rounds


def test_every_round_has_fewer_candidates_and_more_images():
    assert rounds(32, 16) == [(32, 1), (8, 4), (3, 16)]
    assert rounds(2, 1) == [(2, 1)]
