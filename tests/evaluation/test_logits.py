import numpy as np
import pytest

from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.outcomes import FOUND, Journal, Outcomes, concatenate, save_logits

NAMES = ("dense", "dense:1,global:2:r3")
RNG = np.random.default_rng(0)
ROWS = (4, 0, 3)  # no image of the second batch counts
LOGITS = [[RNG.normal(size=(rows, 3)).astype(np.float32) for _ in NAMES] for rows in ROWS]
PARTS = [
    Outcomes(
        names=np.array([f"image {batch}.{row}" for row in range(rows)], "U9"),
        labels=np.arange(rows, dtype=np.int32) % 3,
        rank=np.zeros((2, rows), np.int32),
        prediction=np.zeros((2, rows), np.int32),
        kl=np.zeros((2, rows), np.float32),
        distances=np.zeros((2, rows, 0), np.float32),
        found=np.zeros(len(FOUND), np.int32),
    )
    for batch, rows in enumerate(ROWS)
]


def append(journal, *batches):
    for batch in batches:
        journal.append(PARTS[batch], LOGITS[batch])
    return journal


def check(directory):
    whole = concatenate(PARTS)
    files = ["logits_dense-1-global-2-r3.npz", "logits_dense.npz"]
    assert sorted(path.name for path in directory.iterdir() if path.name != "journal") == files
    for index, name in enumerate(reversed(files)):
        saved = np.load(directory / name, allow_pickle=False)
        assert saved["logits"].dtype == np.float32
        np.testing.assert_array_equal(saved["logits"], np.concatenate([batch[index] for batch in LOGITS]))
        np.testing.assert_array_equal(saved["labels"], whole.labels)
        np.testing.assert_array_equal(saved["names"], whole.names)


def test_an_interrupted_run_saves_the_rows_of_all_its_starts(tmp_path):
    path = tmp_path / "journal"
    append(Journal(path, {}), 0, 1)
    (path / "2.npz").write_bytes(b"torn")
    journal = append(Journal(path, {}), 2)
    save_logits(tmp_path, NAMES, 3, journal, concatenate(journal.parts))
    check(tmp_path)


def test_a_failed_write_is_repeated_the_next_time(tmp_path):
    journal = append(Journal(tmp_path / "journal", {}), 0, 1, 2)
    occupied = tmp_path / "logits_dense-1-global-2-r3.npz"
    occupied.mkdir()
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\): make room, and run it again"):
        save_logits(tmp_path, NAMES, 3, journal, concatenate(PARTS))
    assert not list(tmp_path.glob(".*"))
    occupied.rmdir()
    save_logits(tmp_path, NAMES, 3, Journal(tmp_path / "journal", {}), concatenate(PARTS))
    check(tmp_path)
