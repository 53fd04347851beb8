"""What users give is data: no pickle is loaded, nothing in a file, a store or a workdir is run."""

import ast
import contextlib
import io
import os
import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from builders import noise_store
from test_readers import ct_like, write_nifti

from alice_jax import checkpoint, train, train_state
from alice_jax.data import point_files, sources
from alice_jax.data.preparing import prepare_source
from alice_jax.data.store import Store
from alice_jax.errors import UserError
from alice_jax.interop import torch_file

ROOT = Path(__file__).parents[1]


class Trap:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """A `Trap` that is known to work; in the end it must not have been sprung."""
    path = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(path)))
    path.rmdir()
    yield Trap(path)
    assert not path.exists()


def poisoned(trap) -> dict[str, bytes]:
    """The trap as a bare pickle and in numpy's two formats."""
    array = np.empty(1, object)
    array[0] = trap
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, array, allow_pickle=True)
    np.savez(npz, weights=array)
    return {"pickle": pickle.dumps(trap), "npy": npy.getvalue(), "npz": npz.getvalue()}


@pytest.mark.parametrize("form", ["new", "old", "entry", "pickle", "npy", "npz"])
def test_weights_from_pytorch_are_plain_tensors(tmp_path, trap, form):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    if form in ("new", "old", "entry"):
        content = {"state_dict": {"a": torch.ones(2)}, "meta": trap} if form == "entry" else trap
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    else:
        path.write_bytes(poisoned(trap)[form])
    with pytest.raises(
        UserError, match=r"weights.pth: not a PyTorch file of plain tensors \(\w+\); save a state dict$"
    ):
        torch_file.load(str(path))


def test_no_file_among_the_scans_is_run(tmp_path, trap):
    folder = tmp_path / "in"
    write_nifti(folder / "good.nii.gz", ct_like())
    for form, data in poisoned(trap).items():
        for ending in ("npy", "npz", "pkl", "pt", "nii", "nii.gz", "hdr", "img", "nrrd", "mha", "dcm", "json", "py"):
            (folder / f"{form}.{ending}").write_bytes(data)
        (folder / form).mkdir()
        (folder / form / "dataset.json").write_bytes(data)
    store = Store.create(tmp_path / "store", (2, 2, 2))
    found = sources.find(folder)
    outcomes = [outcome for source in found.sources for outcome in prepare_source(store, source, {})]
    assert store.ids() == ["good"]
    assert {outcome.reason.name for outcome in outcomes if outcome.reason} == {"unreadable"}
    assert found.ignored[".npy"] == found.ignored[".npz"] == found.ignored[".pkl"] == found.ignored[".py"] == 3


@pytest.mark.parametrize("form", ["pickle", "npy", "npz"])
def test_no_file_of_a_store_a_workdir_or_of_points_is_run(tmp_path, trap, form, monkeypatch):
    monkeypatch.setattr("alice_jax.data.store.WAITS_S", ())
    data = poisoned(trap)[form]
    store = noise_store(str(tmp_path / "store"), scans=1)
    for name in ("zarr.json", "c/0/0/0"):
        Path(store.path, "scans", "case0", "volume", name).write_bytes(data)
        with pytest.raises(UserError, match="case0"):
            store.read_volume("case0")
    for name in ("scans/case0/scan.json", "codec.json", "manifest.json"):
        Path(store.path, name).write_bytes(data)
    with pytest.raises(UserError, match=r"scan.json"):
        Store(store.path, store.manifest).scan("case0")
    with pytest.raises(UserError, match=r"codec.json"):
        store.read_json("codec.json")
    with pytest.raises(UserError, match=r"manifest.json"):
        Store.open(store.path)
    for name in ("points.json", "points.csv"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            point_files.read(tmp_path / name)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes(data)
    with pytest.raises(ValueError):
        checkpoint.read_config(str(run))


def test_no_file_of_a_checkpoint_is_run(tmp_path, trap):
    """Each file of a real one in turn; how damage is reported is not the question here."""
    checkpoint.write_config(str(tmp_path), {"objective": "alice"})
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, train_state.TrainState(jnp.array(1), {"a": jnp.ones(3)}, {}, opt_state={}))
    assert checkpoint.restore_arrays(str(tmp_path), None)[1]["params"]["a"].sum() == 3
    files = [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        kept = path.read_bytes()
        path.write_bytes(pickle.dumps(trap))
        with contextlib.suppress(Exception):
            checkpoint.restore_arrays(str(tmp_path), None)
        path.write_bytes(kept)


@pytest.mark.parametrize(
    "override",
    [
        "batch_size=2.5",
        "batch_size=__import__('os').mkdir('{path}')",
        "model.depths=(1,__import__('os').mkdir('{path}'))",
        "views.crop_shape_zyx=__import__('os').mkdir('{path}')",
        "optimizer.learning_rate=high",
        "method.mode=3 if __import__('os').mkdir('{path}') else 4",
    ],
)
def test_overrides_are_typed_values_and_no_expressions(trap, override, tmp_path):
    flags.FLAGS.unparse_flags()
    store = ["--config.data.store=/no/such/store", f"--workdir={tmp_path}/run"]
    with pytest.raises(UserError):
        train.main([f"--config={ROOT}/configs/pretrain.py:tiny", f"--config.{override.format(path=trap.path)}", *store])


# -------------------------------------------------------------------- the source itself

CAN_RUN_DATA = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "code", "runpy"}
RUNS_ITS_OWN = {"alice_jax/cli.py": {"runpy"}}  # a recipe: one of configs/, or one that the user names
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "numpy.load"}
LOADERS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}  # safe with this argument alone


def offences(text: str) -> list[str]:
    """Imports and calls by which a file of the user's could be run."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [module for module in modules if module.split(".")[0] in CAN_RUN_DATA]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            stated = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            argument, safe = LOADERS.get(name, ("", None))
            if name in CALLS or (argument and stated.get(argument) is not safe):
                found.append(name)
    return found


def test_the_source_has_no_way_to_run_data():
    for path in sorted((ROOT / "alice_jax").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        assert set(offences(path.read_text(encoding="utf-8"))) <= RUNS_ITS_OWN.get(name, set()), name


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import load",
        "eval(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=no)",
        "np.load(p)",
    ],
)
def test_a_way_to_run_data_would_be_found(line):
    assert offences(line)
    assert not offences("torch.load(p, weights_only=True); np.load(p, allow_pickle=False); re.compile(x); model.eval()")
