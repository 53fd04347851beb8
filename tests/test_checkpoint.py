"""Checkpoints: what is saved comes back, on other devices too, and mistakes are named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alice_jax import checkpoint, sharding
from alice_jax.errors import UserError
from alice_jax.train_state import TrainState


def make_state(value):
    params = {"layer": {"kernel": jnp.full((8, 2), value)}}
    return TrainState(
        step=jnp.int32(value), params=params, extra={"teacher": params}, opt_state=optax.adamw(1e-3).init(params)
    )


@pytest.fixture
def workdir(tmp_path):
    checkpoint.write_config(str(tmp_path), {"objective": "alice", "steps": 3})
    with checkpoint.Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"seen": step})
    return str(tmp_path)


def test_restores_the_newest_with_structure_and_sharding(workdir):
    everywhere = sharding.replicated(sharding.make_mesh())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), make_state(0))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state, host = checkpoints.restore(checkpoints.latest_step, like)
    assert jax.tree.structure(state) == jax.tree.structure(make_state(0))
    assert state.step == 3 and host == {"seen": 3} and float(state.params["layer"]["kernel"][0, 0]) == 3.0
    assert len(state.params["layer"]["kernel"].addressable_shards) == 8


def test_arrays_without_devices(workdir):
    config, arrays = checkpoint.restore_arrays(workdir)
    assert config == {"objective": "alice", "steps": 3} and arrays["step"] == 3
    assert isinstance(arrays["params"]["layer"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(arrays["extra"]["teacher"]["layer"]["kernel"], 3.0)
    assert checkpoint.restore_arrays(workdir, step=2)[1]["step"] == 2


def test_only_the_newest_are_kept(workdir):
    with pytest.raises(UserError, match=r"--step 1: .*\[2, 3\]"):
        checkpoint.restore_arrays(workdir, step=1)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing_here"):
        checkpoint.restore_arrays(str(tmp_path / "nothing_here"))
    checkpoint.write_config(str(tmp_path), {})
    with pytest.raises(UserError, match="no checkpoint yet"):
        checkpoint.restore_arrays(str(tmp_path))


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        checkpoint.read_config(str(tmp_path))


@pytest.mark.parametrize("use", [checkpoint.read_config, checkpoint.restore_arrays, checkpoint.Checkpoints])
def test_a_bucket_s_address_is_no_workdir(use):
    with pytest.raises(UserError, match=r"^--workdir gs://bucket/run: mount the bucket and give a folder in it"):
        use("gs://bucket/run")


def test_a_bucket_s_address_is_named_by_what_gave_it():
    with pytest.raises(UserError, match=r"^init_from gs://bucket/run: mount the bucket"):
        checkpoint.restore_arrays("gs://bucket/run", field="init_from")
