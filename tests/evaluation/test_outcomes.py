import numpy as np
import pytest

from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.outcomes import Journal, Outcomes, concatenate, save_outcomes

RUN = {"dataset": "noise", "batch_size": 4, "versions": {"jax": "1"}}


def part(index, rows=4):
    """Make the outcomes of one batch under two schedules, with all numbers different."""
    numbers = np.arange(rows, dtype=np.int32) + 100 * index
    return Outcomes(
        np.array([f"a/ä {number}.png" for number in numbers]),
        numbers,
        np.stack([numbers, -numbers]),
        np.stack([2 * numbers, 3 * numbers]),
        np.stack([numbers / 8, numbers / 3]).astype(np.float32),
        np.zeros((2, rows, 0), np.float32),
        np.array([index, 0, 2], np.int32),
    )


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert a.dtype.kind == b.dtype.kind
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def written(tmp_path):
    """A journal of three batches; the second has no image that counts."""
    parts = [part(0), part(1, rows=0), part(2, rows=3)]
    journal = Journal(tmp_path / "journal", RUN)
    for each in parts:
        journal.append(each)
    return tmp_path / "journal", parts


def test_a_run_resumes_after_its_last_batch(written):
    path, parts = written
    journal = Journal(path, dict(reversed(RUN.items())))
    assert_same(journal.parts, parts)
    journal.append(part(3))
    assert_same(Journal(path, RUN).parts, [*parts, part(3)])
    whole = concatenate(journal.parts)
    assert whole.names.tolist()[3:5] == ["a/ä 3.png", "a/ä 200.png"]
    assert whole.rank.shape == (2, 11)
    assert whole.found.tolist() == [6, 0, 8]
    assert whole.labels.tolist() == [0, 1, 2, 3, 200, 201, 202, 300, 301, 302, 303]


def test_the_whole_batches_before_a_torn_one_are_kept(written):
    path, parts = written
    content = (path / "2.npz").read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        (path / "2.npz").write_bytes(content[:size])
        assert_same(Journal(path, RUN).parts, parts[:2])
    # The appended batch replaces the torn one.
    Journal(path, RUN).append(part(2))
    assert_same(Journal(path, RUN).parts, [parts[0], parts[1], part(2)])
    (path / "0.npz").unlink()
    assert Journal(path, RUN).parts == []


def test_nothing_after_a_flipped_bit_is_kept(written):
    path, parts = written
    content = bytearray((path / "2.npz").read_bytes())
    content[content.index(b"rank.npy") + 160] ^= 1
    (path / "2.npz").write_bytes(content)
    assert_same(Journal(path, RUN).parts, parts[:2])


def test_two_runs_in_one_folder_count_no_batch_twice(tmp_path):
    one, other = Journal(tmp_path / "journal", RUN), Journal(tmp_path / "journal", RUN)
    one.append(part(0))
    other.append(part(0))
    assert_same(Journal(tmp_path / "journal", RUN).parts, [part(0)])


def test_another_run_is_reported_and_overwritten_by_the_first_batch(written):
    path, _ = written
    before = (path / "0.npz").read_bytes()
    journal = Journal(path, RUN | {"batch_size": 8, "limit": 3})
    assert journal.parts == []
    assert journal.differs == ("batch_size", "limit")
    assert (path / "0.npz").read_bytes() == before
    journal.append(part(7))
    assert Journal(path, RUN).differs == ("batch_size", "limit")
    assert_same(Journal(path, RUN | {"batch_size": 8, "limit": 3}).parts, [part(7)])


def test_skipped_images_are_forgotten_with_all_later_batches(written):
    path, parts = written
    journal = Journal(path, RUN)  # batches 1 and 2 have skipped images
    journal.forget_skips()
    assert_same(journal.parts, parts[:1])


def test_a_full_disk_is_reported(tmp_path):
    (tmp_path / "journal").write_bytes(b"one of an earlier version")
    journal = Journal(tmp_path / "journal", RUN)
    with pytest.raises(InputError, match="journal cannot be written"):
        journal.append(part(0))
    assert journal.parts == []
    with pytest.raises(InputError, match=r"outcomes\.npz cannot be written"):
        save_outcomes(tmp_path / "gone" / "outcomes.npz", ["dense", "tome_r2"], part(0))


def test_the_saved_file_is_read_without_this_library(tmp_path):
    save_outcomes(tmp_path / "outcomes.npz", ["dense", "tome_r2"], part(1))
    saved = np.load(tmp_path / "outcomes.npz", allow_pickle=False)
    assert set(saved) == {"schedules", "names", "labels", "rank", "prediction", "kl"}
    assert saved["schedules"].tolist() == ["dense", "tome_r2"]
    arrays = {key: saved[key] for key in Outcomes._fields if key in saved}  # the others are in the rows
    assert_same([part(1)._replace(**arrays)], [part(1)])
    assert [path.name for path in tmp_path.iterdir()] == ["outcomes.npz"]
