"""Disks that fail: what is damaged is never read, what is whole is never lost, and the user reads one line."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import pytest
from builders import noise_store
from test_checkpoint import make_state

from alice_jax import checkpoint, sharding
from alice_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A workdir with the checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp("written")
    checkpoint.write_config(str(workdir), {})
    with checkpoint.Checkpoints(str(workdir), keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"seen": step})
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def files_of(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    times_alone = {folder / "_CHECKPOINT_METADATA", folder / "commit_success.txt"}
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in times_alone]


def flip(path, bit=0):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def restored(workdir):
    mesh = sharding.make_mesh()
    like = sharding.described(jax.eval_shape(lambda: make_state(0)), mesh)
    with checkpoint.Checkpoints(str(workdir), keep=2) as checkpoints:
        state, host = checkpoints.restore(checkpoints.latest_step, like)
    return int(state.step), host


def test_a_flipped_bit_a_missing_byte_or_a_missing_file_is_noticed_wherever_it_is(workdir):
    folder = workdir / "checkpoints" / "2"
    assert checkpoint.damage(folder) is None and len(files_of(workdir, 2)) > 5
    for path in files_of(workdir, 2):
        whole = path.read_bytes()
        for spoil in (flip, cut, pathlib.Path.unlink):
            spoil(path)
            assert path.name in checkpoint.damage(folder) or path.name == checkpoint.CHECKSUMS
            path.write_bytes(whole)
    assert checkpoint.damage(folder) is None


@pytest.mark.parametrize("spoil", [flip, cut, pathlib.Path.unlink])
def test_the_newest_intact_checkpoint_is_used_and_the_damaged_one_kept_aside(workdir, capsys, spoil):
    largest = max(files_of(workdir, 2), key=lambda path: path.stat().st_size)
    spoil(largest)
    assert checkpoint.restore_arrays(str(workdir))[1]["step"] == 1
    line = capsys.readouterr().err
    assert "step 2" in line and largest.name in line and "the newest intact one is of step 1" in line
    assert restored(workdir) == (1, {"seen": 1})
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2.damaged"]
    with checkpoint.Checkpoints(str(workdir), keep=2) as checkpoints:  # its step can be written again
        checkpoints.save(2, make_state(2), {"seen": 2})
    assert restored(workdir) == (2, {"seen": 2})


def test_orbax_s_own_record_of_times_may_be_damaged(workdir):
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        flip(workdir / "checkpoints" / "2" / name)
    assert restored(workdir) == (2, {"seen": 2})


def test_nothing_starts_over_where_no_checkpoint_is_intact(workdir):
    for step in (1, 2):
        cut(files_of(workdir, step)[-1])
    for _ in range(2):  # and not the second time either
        with pytest.raises(UserError, match=r"no checkpoint is intact \(step 2: .*, step 1: .*\); put back a copy"):
            checkpoint.Checkpoints(str(workdir))
    with pytest.raises(UserError, match="no checkpoint is intact"):
        checkpoint.restore_arrays(str(workdir))


def test_a_damaged_checkpoint_is_not_read_when_asked_for(workdir):
    flip(files_of(workdir, 1)[0])
    with pytest.raises(UserError, match=r"--step 1: .* is damaged"):
        checkpoint.restore_arrays(str(workdir), step=1)
    assert checkpoint.restore_arrays(str(workdir))[1]["step"] == 2


def test_a_half_written_checkpoint_is_neither_read_nor_kept(workdir):
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "3.orbax-checkpoint-tmp")
    assert restored(workdir) == (2, {"seen": 2})
    with checkpoint.Checkpoints(str(workdir), keep=2) as checkpoints:
        checkpoints.save(4, make_state(4))
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4"]


def test_too_little_space_is_said_before_anything_is_computed(workdir):
    with checkpoint.Checkpoints(str(workdir), keep=3) as checkpoints:
        checkpoints.check_space(make_state(0))
        with pytest.raises(UserError, match=r"3 checkpoints and the next one need 4,000,000,000 MB and [\d,]+ MB are"):
            checkpoints.check_space({"params": jax.ShapeDtypeStruct((10**9, 250_000), "float32")})


# ---- Real disks that are full or read-only, in a name space of their own


def on_small_disk(script, folder):
    """Runs a shell script with $DISK, an empty file system of 2 MB that only it sees."""
    mount = f"mount -t tmpfs -o size=2m tmpfs {folder}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "sh", "-c", mount]).returncode:
        pytest.skip("no unprivileged mounts here")
    variables = os.environ | {"PYTHON": sys.executable, "DISK": str(folder), "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    command = ["unshare", "-Urm", "sh", "-c", f"{mount}\n{textwrap.dedent(script)}"]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, encoding="utf-8", timeout=300)


def errors_of(done):
    return [line for line in done.stderr.splitlines() if not line.startswith(("WARNING", "mount:"))]


SAVES = """
import sys
from alice_jax import checkpoint, cli
from test_checkpoint import make_state

def main():
    disk = sys.argv[1]
    with checkpoint.Checkpoints(disk, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.save(2, make_state(2))
    with checkpoint.Checkpoints(disk, keep=1) as checkpoints:
        with open(f"{disk}/filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(512))
            except OSError:
                pass
        checkpoints.save(3, make_state(3))

cli.run(main)
"""


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path):
    script = tmp_path / "saves.py"
    script.write_text(SAVES)
    (tmp_path / "disk").mkdir()
    done = on_small_disk(
        f"""
        $PYTHON {script} $DISK
        echo code $?
        $PYTHON -c "from alice_jax import checkpoint; print('intact', checkpoint.newest_intact('$DISK'))"
        """,
        tmp_path / "disk",
    )
    assert done.stdout.splitlines() == ["code 1", "intact (2, [])"], done.stderr
    assert len(errors_of(done)) == 1, done.stderr
    assert errors_of(done)[0].startswith("error: --workdir") and "the last one, of step 2, is untouched" in done.stderr


def test_a_read_only_folder_is_one_line(tmp_path):
    store = noise_store(str(tmp_path / "store"), scans=3)
    (tmp_path / "disk").mkdir()
    done = on_small_disk(
        f"""
        mount -o remount,ro $DISK
        $PYTHON -m alice_jax.train --config=tests/configs/small.py --config.data.store={store.path} --workdir=$DISK/run
        echo code $?
        """,
        tmp_path / "disk",
    )
    assert done.stdout == "code 1\n"
    assert len(errors_of(done)) == 1 and "Read-only file system" in errors_of(done)[0]


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_a_training_with_one_line(tmp_path):
    store = noise_store(str(tmp_path / "store"), scans=6)
    (tmp_path / "disk").mkdir()
    settings = f"--config.data.store={store.path} --config.views.kind=random --config.steps=100000"
    done = on_small_disk(
        f"""
        mount -o remount,size=40m $DISK
        $PYTHON -m alice_jax.train --config=tests/configs/small.py {settings} --workdir=$DISK/run 2> $DISK/log &
        while kill -0 $! && ! test -e $DISK/run/checkpoints/4; do sleep 0.1; done
        cat /dev/zero > $DISK/filler
        wait $!
        echo code $?
        grep -a error: $DISK/log
        grep -a -c Traceback $DISK/log
        $PYTHON -c "from alice_jax import checkpoint; print(json.dumps(checkpoint.newest_intact('$DISK/run')))"
        """.replace("print(json", "import json; print(json"),
        tmp_path / "disk",
    )
    code, error, tracebacks, intact = done.stdout.splitlines()
    assert code == "code 1" and tracebacks == "0", done.stdout + done.stderr
    assert "No space left on device" in error
    assert json.loads(intact)[0] >= 2 and json.loads(intact)[1] == []
