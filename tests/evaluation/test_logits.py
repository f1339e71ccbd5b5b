import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax.data.batches import Batch
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.logits import LogitsWriter
from fcvit_jax.evaluation.outcomes import Outcomes
from fcvit_jax.files import file_name

NAMES = ("dense", "dense:1,global:2:r3")
RNG = np.random.default_rng(0)
LOGITS = [{name: jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32) for name in NAMES} for _ in range(3)]
MASKS = [[True] * 4, [True, False, True, True], [True, False, False, False]]  # one has no label, three are padding
LABELS = np.arange(8, dtype=np.int32) % 3
WHOLE = Outcomes(np.array([f"image {i}" for i in range(8)]), LABELS, LABELS[None], LABELS[None], LABELS[None])


def batch(index):
    rows = np.zeros((4, 2, 2, 3), np.uint8)
    return Batch(rows, np.zeros(4, np.int32), np.array(MASKS[index]), ("",) * 4)


def expected(name):
    return np.concatenate([np.asarray(LOGITS[k][name])[MASKS[k]] for k in range(3)])


def check(directory):
    assert sorted(path.name for path in directory.glob("*.npz")) == [
        "logits_dense-1-global-2-r3.npz",
        "logits_dense.npz",
    ]
    for name in NAMES:
        saved = np.load(directory / f"logits_{file_name(name)}.npz", allow_pickle=False)
        assert saved["logits"].dtype == np.float32
        np.testing.assert_array_equal(saved["logits"], expected(name))
        np.testing.assert_array_equal(saved["labels"], LABELS)
        np.testing.assert_array_equal(saved["names"], WHOLE.names)


def test_rows_that_count_in_order(tmp_path):
    writer = LogitsWriter(tmp_path, NAMES, (11, 3))
    for k in range(3):
        writer.add(batch(k), LOGITS[k])
    writer.save(WHOLE)
    check(tmp_path)
    LogitsWriter.remove(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_run_goes_on_with_the_rows_that_are_there(tmp_path):
    first = LogitsWriter(tmp_path, NAMES, (11, 3))
    first.add(batch(0), LOGITS[0])
    first.add(batch(1), LOGITS[2])  # of a batch whose outcomes were not written any more: to be written over
    second = LogitsWriter(tmp_path, NAMES, (11, 3), start=4)
    for k in (1, 2):
        second.add(batch(k), LOGITS[k])
    second.save(WHOLE)
    check(tmp_path)


def test_what_cannot_be_written_is_told_and_written_the_next_time(tmp_path):
    first = LogitsWriter(tmp_path, NAMES, (11, 3))
    for k in range(3):
        first.add(batch(k), LOGITS[k])
    occupied = tmp_path / f"logits_{file_name(NAMES[1])}.npz"
    occupied.mkdir()
    with pytest.raises(InputError, match=r"logits_dense-1-.*npz cannot be written \(Is a directory\): make room and"):
        first.save(WHOLE)
    # Room is given back schedule by schedule: the first stands, and what it was read from is gone.
    assert sorted(path.name for path in (tmp_path / ".logits").glob("*.npy")) == ["1.npy"]
    occupied.rmdir()
    LogitsWriter(tmp_path, NAMES, (11, 3), start=8).save(WHOLE)
    check(tmp_path)
    LogitsWriter(tmp_path, NAMES, (11, 3), start=8).save(WHOLE)  # nothing is left to do
    check(tmp_path)
    assert not list((tmp_path / ".logits").glob("*.npy"))


def test_the_room_is_taken_beforehand(tmp_path):
    LogitsWriter(tmp_path, NAMES, (1000, 1000))
    taken = sum(512 * path.stat().st_blocks for path in (tmp_path / ".logits").iterdir())
    assert taken >= 3 * 4_000_000  # of two schedules, and of one while it is written anew


def test_files_that_are_gone_are_told(tmp_path):
    with pytest.raises(InputError, match=r"\.logits cannot be used"):
        LogitsWriter(tmp_path, NAMES, (11, 3), start=4)
    with pytest.raises(InputError, match=r"\.logits cannot be used"):
        LogitsWriter(tmp_path / "nowhere", NAMES, (11, 3))
