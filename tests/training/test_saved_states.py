import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from fcvit_jax import parallel
from fcvit_jax.errors import InputError
from fcvit_jax.training.log import Log
from fcvit_jax.training.saved_states import SavedStates


def mesh(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))


def state():
    kernel = jnp.arange(512 * 256, dtype=jnp.float32).reshape(512, 256)
    return {"params": {"kernel": kernel, "bias": jnp.ones(3)}, "key": jax.random.key(7), "ema": ()}


def test_large_leaves_are_spread_and_small_ones_are_not():
    places = parallel.fully_sharded(mesh(2), {**state()["params"], "odd": jnp.zeros((999, 333))})
    spread = jax.device_put(state()["params"]["kernel"], places["kernel"])
    assert spread.addressable_shards[0].data.shape == (256, 256)
    assert places["bias"].is_fully_replicated
    assert places["odd"].is_fully_replicated  # no axis divides


@pytest.mark.devices(8)
def test_a_state_comes_back_on_another_number_of_devices(tmp_path):
    placed = jax.device_put(state(), parallel.fully_sharded(mesh(8), state()))
    with contextlib.closing(SavedStates(tmp_path)) as states:
        assert states.latest() is None
        for step in (1, 2, 3):
            states.save(step, placed, {"best": step / 10})
        states.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    with contextlib.closing(SavedStates(tmp_path)) as states:
        assert (states.latest(), states.notes()) == (3, {"best": 0.3})
        for count in (1, 2):
            places = parallel.fully_sharded(mesh(count), state())
            shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state(), places)
            back = states.restore(shapes)
            assert len(back["params"]["kernel"].sharding.device_set) == count
            np.testing.assert_array_equal(back["params"]["kernel"], placed["params"]["kernel"])
            np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(placed["key"]))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    with contextlib.closing(SavedStates(tmp_path)) as states:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(states._manager, "save", full)
        with pytest.raises(InputError, match=r"cannot be written \(the disk is full\): make room"):
            states.save(1, state(), {})
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**19))
        with pytest.raises(InputError, match=r"the disk is full: [\d.]+ MiB are needed, 0\.5 MiB free"):
            states.save(1, state(), {})


def test_a_failure_in_the_background_is_one_line_wherever_it_is_raised(tmp_path, monkeypatch):
    def failing(*words):
        def fail(*args, **kwargs):
            raise OSError(*words)

        return fail

    states = SavedStates(tmp_path)
    told = r"cannot be written \(the disk is full\): make room"
    with monkeypatch.context() as patch:
        patch.setattr(states._manager, "wait_until_finished", failing(28, "No space left on device"))
        # The size of the previous state is known only when it is written.
        patch.setattr("fcvit_jax.training.saved_states.check_room", failing("asked too early"))
        with pytest.raises(InputError, match=told):
            states.save(1, state(), {})
    with monkeypatch.context() as patch:
        patch.setattr(states._manager, "close", failing(122, "Disk quota exceeded"))
        with pytest.raises(InputError, match=told):
            states.close()
    states.close()


def test_a_disk_that_turns_out_full_is_one_line(tmp_path, monkeypatch, caplog):
    """A real disk of half a megabyte, if this user may mount it."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        monkeypatch.setattr("fcvit_jax.training.saved_states.check_room", lambda *_: None)
        with contextlib.closing(SavedStates(tmp_path / "states")) as states:
            rng = np.random.default_rng(0)  # so that Orbax cannot compress it
            large = {"kernel": jnp.asarray(rng.standard_normal(2**19), jnp.float32)}

            def write():
                states.save(1, large, {})
                states.wait()

            told = r"states cannot be written \(the disk is full\): make room"
            with pytest.raises(InputError, match=told):
                write()
            states.save(2, large, {})
            with pytest.raises(InputError, match=told):
                states.close()
        assert [record for record in caplog.records if record.exc_info] == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_notes_are_saved_as_they_were_at_the_call(tmp_path, monkeypatch):
    with contextlib.closing(SavedStates(tmp_path)) as states:
        given, notes = [], {"best": 0.1}
        monkeypatch.setattr(states._manager, "save", lambda step, args: given.append(args))
        states.save(1, state(), notes)  # Orbax writes them in its own thread
        notes["best"] = 0.2
        assert given[0]["notes"].item == {"best": 0.1}


def damage(path, how):
    if how == "notes":
        (path / "notes" / "metadata").write_text('{"best": ')
    elif how == "gone":
        shutil.rmtree(path / "state")
    else:
        for file in (path / "state").rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if how == "cut" else b"")


def test_any_change_of_a_state_on_disk_is_noticed(tmp_path):
    """Even a changed byte inside an array's numbers, which Orbax reads as other numbers."""
    with contextlib.closing(SavedStates(tmp_path / "saved")) as states:
        for step in (1, 2):
            states.save(step, state(), {"best": step / 10})
        states.wait()
    files = [file for item in ("notes", "state") for file in (tmp_path / "saved" / "2" / item).rglob("*")]
    names = [str(file.relative_to(tmp_path / "saved")) for file in files if file.is_file()]
    assert any("/d/" in name for name in names)
    for name, why in [*((name, "damaged") for name in names), (names[-1], "missing")]:
        copy = shutil.copytree(tmp_path / "saved", tmp_path / "copy")
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content) if why == "damaged" else (copy / name).unlink()
        told = rf"{copy / '2'} cannot be read \({name[2:]} is {why}\): delete it, and the run resumes from step 1$"
        with contextlib.closing(SavedStates(copy)) as states, pytest.raises(InputError, match=told):
            states.notes()
        shutil.rmtree(copy)


# If the first of several leaves cannot be read, TensorStore's threads may find the loop that waited for them closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["notes", "gone", "cut", "empty"])
def test_a_damaged_state_is_named_and_the_run_resumes_without_it(tmp_path, how):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state())

    def read(states):
        return states.notes(), states.restore(shapes)

    with contextlib.closing(SavedStates(tmp_path)) as states:
        for step in (1, 2):
            states.save(step, state(), {"best": step / 10})
    for step, then in ((2, "resumes from step 1"), (1, "starts from the beginning")):
        damage(tmp_path / str(step), how)
        told = rf"{tmp_path / str(step)} cannot be read \(.{{1,200}}\): delete it, and the run {then}$"
        with contextlib.closing(SavedStates(tmp_path)) as states, pytest.raises(InputError, match=told) as error:
            read(states)
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / str(step))
        with contextlib.closing(SavedStates(tmp_path)) as states:
            assert states.latest() == (1 if step == 2 else None)
            if step == 2:
                assert read(states)[0] == {"best": 0.1}


def test_processes_that_see_different_states_raise(tmp_path, monkeypatch):
    with contextlib.closing(SavedStates(tmp_path)) as states:
        states.check_shared()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            for theirs in (-1, 8):
                other = [np.int32(theirs)]
                patch.setattr(multihost_utils, "process_allgather", lambda mine, other=other: np.array([mine, *other]))
                if theirs == -1:
                    states.check_shared()
                    continue
                with pytest.raises(InputError, match=r"see different states there \(none, 8\): --workdir must be one"):
                    states.check_shared()


def test_half_written_states_of_a_killed_run_are_deleted(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    with contextlib.closing(SavedStates(tmp_path)) as states:
        assert states.latest() is None
        states.save(8, state(), {})
        states.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["8"]


def test_the_log_of_a_resumed_run_has_no_row_twice(tmp_path):
    log = Log(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a row
    log = Log(tmp_path, 2, tensorboard=False)
    log.write(3, {"loss": 0.5})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}]


def test_the_rows_that_are_kept_stay_where_they_are_and_tests_of_the_step_are_made_again(tmp_path, monkeypatch):
    path, kept = (
        tmp_path / "metrics.jsonl",
        '{"step": 4, "loss": 1}\n{"step": 4, "test/dense": 0.5}\n{"step": 8, "loss": 2}\n',
    )
    for behind in (
        "",
        '{"step": 8, "test/dense": 0.6}\n',
        '{"step": 9}\n{"step": 8}\n',
        '{"step": 8}',
        "nonsense\n",
        "[1]\n",
    ):
        path.write_text(kept + behind)
        with monkeypatch.context() as patch:
            patch.delattr("pathlib.Path.write_text")
            patch.delattr("pathlib.Path.write_bytes")
            Log(tmp_path, 8, tensorboard=False).close()
        assert path.read_text() == kept


def test_a_log_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    log = Log(tmp_path, 0, tensorboard=False)
    log._file.close()
    monkeypatch.setattr(log, "_file", Path("/dev/full").open("ab"))  # noqa: SIM115
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written \(the disk is full\): make room"):
        log.write(1, {"loss": 1.0})
    log.close()


def test_events_that_cannot_be_written_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    for wanted in (True, False):
        log = Log(tmp_path, 0, tensorboard=wanted)
        log.write(1, {"loss": 1.0})
        log.close()
    (told,) = capsys.readouterr().out.splitlines()
    assert told == "no events for TensorBoard: pip install tensorboardX, or tensorboard=false"


def test_events_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    log = Log(tmp_path, 0, tensorboard=True)
    log.write(1, {"loss": 1.0})
    log.close()
    (events,) = (tmp_path / "events").iterdir()
    assert b"loss" in events.read_bytes()


@pytest.mark.parametrize("where", ["here", "host:1,2", "host:1,2,2", "host,2,0", "host:1,two,0"])
def test_the_address_of_the_processes_is_checked(where):
    with pytest.raises(InputError, match="write auto, or HOST:PORT,COUNT,INDEX"):
        parallel.start_processes(where)
