"""Compiling ahead: names of slices, what is read from a TPU program's text, bounds, and one real compilation."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from alice_jax import aot, cli
from alice_jax.ahead import compiling, padding, roofline, topologies
from alice_jax.ahead.compiling import Program
from alice_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"--config={ROOT}/configs/pretrain.py"


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "compiler", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v5e-256", "v5e:16x16", 256),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5p-128", "v5p:4x4x4", 64),  # 128 TensorCores
        ("v6e-256", "v6e:16x16", 256),
    ],
)
def test_names_of_slices(name, compiler, chips):
    found = topologies.named(name)
    assert (found.name, found.chips) == (compiler, chips)


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e-3", "v5p-127", "v7-8", "v5e", "", "v5e-x"])
def test_an_unknown_slice_is_one_line_that_lists_those_known(name):
    with pytest.raises(UserError, match=r"--topology.*v5e: 1x1, 2x2.*v5p: 2x2x1.*v6e.*v5litepod-16"):
        topologies.named(name)


def test_every_slice_of_the_sweep_has_a_smaller_one_to_be_modelled_from():
    for name in topologies.SWEEP:
        of = topologies.named(name)
        assert any(1 < chips < of.chips for chips in of.chip.shapes)


# ---------------------------------------------------------------- padding

HLO = """
  %x = bf16[2,64,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[2,64,8]{2,1,0:T(8,128)(2,1)} parameter(1)
  %qk = f32[2,64,64]{2,1,0:T(8,128)} convolution(%x, %y), window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0oi->0bf, metadata={op_name="jit(step)/attention/...qe,...pe->...qp/dot_general"}
  %w = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(2)
  %z = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(3)
  ROOT %full = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%z, %w), dim_labels=bf_io->bf, metadata={op_name="jit(step)/mlp/fc1/dot_general"}
"""  # noqa: E501


def test_products_that_fill_their_units_and_tiles_waste_nothing():
    [_, full] = padding.products(HLO)
    assert full.flops == full.filled_flops == 2 * 64 * 256 * 128
    assert full.numbers == full.stored == 64 * 256 + 256 * 128 + 64 * 128


def test_attention_over_8_channels_fills_a_sixteenth_of_the_unit_and_of_the_tiles():
    """Two heads: 64 queries, 64 keys, 8 channels; 64 columns are half of the unit's 128, too."""
    [scores, _] = padding.products(HLO.replace("window={size=2 stride=1", "window={size=2 stride=1 pad=0_0"))
    assert scores.flops == 2 * 2 * 64 * 64 * 8
    assert scores.filled_flops == scores.flops * 16 * 2
    assert scores.numbers == 2 * (64 * 8 + 64 * 8 + 64 * 64)
    assert scores.stored == 2 * (64 * 128 + 64 * 128 + 64 * 128)


def test_a_convolution_counts_the_taps_that_fall_on_voxels():
    """4 × 4 inputs, 3 × 3 window with a border of 1: along each axis 3·4 − 2 = 10 of the 12 taps are inside."""
    text = """
  %x = f32[1,4,4,3]{3,2,1,0} parameter(0)
  %k = f32[3,3,3,5]{3,2,1,0} parameter(1)
  %y = f32[1,4,4,5]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
"""
    [product] = padding.products(text)
    assert product.flops == pytest.approx(2 * 10 * 10 * 3 * 5)
    assert product.numbers == product.stored == 48 + 135 + 80  # no tiles, nothing filled up


# ---------------------------------------------------------------- what follows


def test_the_bound_adds_the_network_to_the_slower_of_computing_and_moving():
    """v5e: 197 TFLOP/s, 819 GB/s, 200 GB/s sent; an all-reduce of 16 GB among 16 chips sends 30 GB."""
    chip = topologies.CHIPS["v5e"]
    bound = roofline.bound(197e12, 2 * 819e9, [("all-reduce", 16_000_000_000, 1)], chip, chips=16)
    assert (bound.computing, bound.moving, bound.network) == pytest.approx((1.0, 2.0, 0.15))
    assert bound.step == pytest.approx(2.15)


def test_gathers_and_scatters_stay_within_a_group():
    """Of 4 of 16 chips: 3/4 of 16 GB each way at 200 GB/s, and 30 GB of the all-reduce among all."""
    sent = [("all-gather", 16 * 10**9, 1), ("all-reduce", 16 * 10**9, 1), ("reduce-scatter", 16 * 10**9, 1)]
    assert roofline.network_seconds(sent, 16, 200e9, parameters=4) == pytest.approx((12 + 30 + 12) / 200)
    assert roofline.network_seconds(sent, 16, 200e9, parameters=16) == pytest.approx((15 + 30 + 15) / 200)


def step(config, target):
    """For `compile_step`: 1 GB of state, 2 GB a pair and stage that is not computed again; above 33 none fits."""
    pairs = config.batch_size // target.chips
    stages = 4 - len(config.model.remat)
    size = dict(parameters=10**9, optimizer=0, extra=0, batch=0, kept=0)
    if pairs * stages > 16:
        return Program(**size, too_large="RESOURCE_EXHAUSTED: 99G exceeds 15.75G")
    return Program(**size, temporaries=2 * 10**9 * pairs * stages, flops=1e12, moved=1e9)


@pytest.fixture
def counted(monkeypatch):
    """`aot` with `step` for a compiler; the list of what it was asked to compile."""
    asked = []

    def compile_step(config, target, unit):
        asked.append(config.batch_size)
        return step(config, target)

    monkeypatch.setattr(aot.topologies, "devices", lambda target: target)
    monkeypatch.setattr(compiling, "compile_step", compile_step)
    return asked


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["aot", CONFIG, *arguments])  # where overrides of fields are looked up
    return aot.main(sys.argv[1:])


def test_a_batch_is_fitted_by_computing_the_fewest_stages_again(counted, monkeypatch, capsys):
    """16.9 GB less 1 of state: 1 pair with all four stages kept, 2 with three, 3 with two; wanted are 2 a chip."""
    assert main(monkeypatch, "--topology=v5e:2x2", "--config.batch_size=8", "--fit") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "--config.batch_size=8 --config.model.remat='(0,)'"
    assert [line.split()[-4] for line in lines[:-1]] == ["1", "2"]


def test_what_does_not_fit_is_a_result_and_not_an_error(counted, monkeypatch, capsys):
    assert main(monkeypatch, "--topology=v5e-4", "--config.batch_size=64") == 0
    out = capsys.readouterr().out
    assert "does not fit: RESOURCE_EXHAUSTED" in out and "the largest batch: 0 pairs" in out


def test_a_batch_is_raised_to_a_multiple_of_the_chips(counted, monkeypatch, capsys, tmp_path):
    """And what a file keeps is not compiled again."""
    command = ["--topology=v5e:4x4", f"--json={tmp_path}/kept.json"]
    assert main(monkeypatch, *command) == 0 and counted == [16, 32]
    first = capsys.readouterr().out
    assert main(monkeypatch, *command) == 0 and counted == [16, 32]
    assert capsys.readouterr().out == first
    assert "batch_size 8 cannot be divided over 16 chips: 16 is compiled" in first
    assert "the largest batch: 1 pairs a chip" in first


def test_a_sweep_says_what_was_compiled_and_what_was_modelled(counted, monkeypatch, capsys, tmp_path):
    flags = [
        "--sweep",
        "v5e-16",
        "v5e-256",
        "--price-per-chip-hour=3.6",
        f"--plot={tmp_path}/sweep.png",
        f"--json={tmp_path}/kept.json",
    ]
    assert main(monkeypatch, "--topology=v5e-16", "--quick", flags[-1]) == 0
    assert main(monkeypatch, *flags) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("v")}
    assert rows["v5e-16"].endswith("  compiled") and rows["v5e-256"].endswith("modelled from v5e:4x4")
    # 1 TFLOP at 197 TFLOP/s is 5.08 ms: 197 pairs/s a chip, whose 1000 s for 197,000 pairs cost 1.
    assert rows["v5e-256"].split()[3:7] == ["5.1", "50432", "100.0%", "5.08"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- mistakes, and the real compiler

OLDER = {"v5e:4x4": {"parameters": 1, "optimizer": 0, "extra": 0, "batch": 0, "kept": 0, "gone": 0, "products": []}}


@pytest.mark.parametrize("kept", [[], None, {"v5e:4x4": []}, {"v5e:4x4": {}}, OLDER])
def test_a_file_with_something_else_is_refused(kept, counted, monkeypatch, tmp_path):
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"--json .*kept\.json: holds no programs of this version .* name another file"):
        main(monkeypatch, "--topology=v5e:4x4", f"--json={tmp_path}/kept.json")


def test_a_file_that_cannot_be_written_is_one_line(counted, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=rf"--plot {tmp_path}: cannot be written: Is a directory"):
        main(monkeypatch, "--sweep", "v5e-16", f"--plot={tmp_path}")
    with pytest.raises(UserError, match=rf"--json {tmp_path}: cannot be written: Is a directory"):
        aot.Compiled(tmp_path, {}).step(cli.recipe(f"{ROOT}/configs/pretrain.py"), topologies.named("v5e-4"))


def test_what_train_refuses_is_refused(counted, monkeypatch):
    with pytest.raises(UserError, match=r"^batch_size 0: give a whole number of 1 or more"):
        main(monkeypatch, "--topology=v5e:4x4", "--config.batch_size=0")
    assert counted == []
    with pytest.raises(UserError, match=r"^mesh\.parameters 16: --sweep is for 1; give a slice by --topology"):
        main(monkeypatch, "--sweep", "v5e-16", "--config.mesh.parameters=16")


def run(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_OPTIMIZATION_LEVEL": "O1"}
    command = [sys.executable, "-m", "alice_jax.aot", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_line_names_the_extra():
    result = run(CONFIG, "--topology=v5e-4", "--config.batch_size=4")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: no compiler for tpu here: pip install 'alice_jax[tpu]'")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_small_step_compiles_for_tpu_chips_that_are_not_there(tmp_path):
    config = f"--config={ROOT}/tests/configs/small.py"
    result = run(config, "--config.microbatch=0", "--topology=v5e:2x2", "--quick", f"--json={tmp_path}/kept.json")
    assert result.returncode == 0, result.stderr
    assert "fits: 0." in result.stdout
    [program] = json.loads((tmp_path / "kept.json").read_text()).values()
    assert 0 < sum(product["flops"] for product in program["products"]) <= program["flops"]
    assert {kind for kind, _, _ in program["collectives"]} == {"all-reduce"}
