"""A run notes what it was computed with, and nothing about where."""

import json
import socket
import subprocess

import jax

from alice_jax import provenance


def test_each_start_adds_an_entry(tmp_path):
    provenance.record(str(tmp_path), 0)
    provenance.record(str(tmp_path), 40, embedder="abc")
    first, second = provenance.read(str(tmp_path))
    assert (first["step"], second["step"]) == (0, 40)
    assert (first["embedder"], second["embedder"]) == (None, "abc")
    assert first["versions"]["jax"] == jax.__version__ and "python" in first["versions"]


def test_the_computer_and_its_user_are_not_named(tmp_path):
    provenance.record(str(tmp_path), 0)
    text = (tmp_path / provenance.NAME).read_text(encoding="utf-8")
    assert set(json.loads(text)[0]) == {"step", "time", "versions", "commit", "devices", "processes", "embedder"}
    assert socket.gethostname() not in text and str(tmp_path) not in text


def test_a_missing_or_damaged_file_is_no_reason_to_stop(tmp_path):
    assert provenance.read(str(tmp_path)) == []
    (tmp_path / provenance.NAME).write_text("[{", encoding="utf-8")
    provenance.record(str(tmp_path), 3)
    assert [entry["step"] for entry in provenance.read(str(tmp_path))] == [3]


def test_the_commit_is_that_of_the_project_alone(tmp_path):
    """A folder inside somebody else's repository has none; a changed file is marked."""

    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *author, *arguments], check=True, capture_output=True)

    assert provenance.commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1", encoding="utf-8")
    git("add", "file")
    git("commit", "-m", "one")
    clean = provenance.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2", encoding="utf-8")
    assert provenance.commit(tmp_path) == clean + "+"
    (tmp_path / "inside").mkdir()
    assert provenance.commit(tmp_path / "inside") is None
