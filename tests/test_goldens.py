"""The golden files of this folder, one test each, through the same code as `check_goldens.py`."""

import pathlib

import check_goldens
import jax
import numpy as np
import pytest
from golden_checks.report import Report

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.mark.parametrize("path", check_goldens.golden_files(GOLDENS), ids=lambda path: path.stem)
def test_golden_file(path):
    with jax.default_matmul_precision("highest"):
        report = check_goldens.check_file(path)
    assert report.ok, "\n".join(report.lines())


@pytest.mark.parametrize(
    ("got", "ok"), [([1.0, 2.0], True), ([1.0, 2.001], False), ([1.0, np.nan], False), ([1.0], False)]
)
def test_a_number_off_its_limit_fails_the_file(got, ok):
    report = Report("file.npz", {"a": np.array([1.0, 2.0])})
    report.close("a", got, 1e-4)
    assert report.ok is ok


def test_a_forgotten_array_fails_the_file():
    report = Report("file.npz", {"a": np.arange(2), "b": np.arange(3), "c": np.arange(4)})
    report.equal("a", np.arange(2))
    report.configuration("b")
    assert not report.ok
    assert report.forgotten == ["c"]
    report.unused("c")
    assert report.ok


def test_a_file_in_which_nothing_was_compared_fails():
    report = Report("file.npz", {"a": np.arange(2)})
    report.configuration("a")
    assert not report.ok


def test_statistics_are_judged_by_what_they_tell_of():
    report = Report("file.npz", {"x_stats": np.array([0.1, 1.0, -3.0, 4.0, 1e6])})
    report.close("x_stats", [0.101, 1.0, -3.0, 4.0, 1e6], 1e-4)  # a hundred times less than 1e-4 of the sum
    assert not report.ok


@pytest.mark.parametrize("name", ["unheard_of.npz", "notes.txt", "nnformer_broken.npz"])
def test_an_unknown_or_broken_file_fails(tmp_path, monkeypatch, capsys, name):
    path = tmp_path / name
    if name.startswith("unheard"):
        np.savez(path, a=np.arange(3))
    else:
        path.write_bytes(b"no arrays in here")
    monkeypatch.setattr("sys.argv", ["check_goldens.py", str(tmp_path)])
    assert check_goldens.main() == 1
    assert f"FAILED: {name}" in capsys.readouterr().out


def test_an_empty_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_goldens.py", str(tmp_path)])
    with pytest.raises(check_goldens.UserError, match="no golden file"):
        check_goldens.main()
