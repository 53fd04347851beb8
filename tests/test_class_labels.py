"""Classes of scans from a CSV: what is read, and every mistake in one line."""

import dataclasses

import numpy as np
import pytest
from builders import make_scan, noise_store

from alice_jax.data import class_labels
from alice_jax.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Scans case0 to case4; case0 was prepared from /data/first.nii.gz and is of the patient of case1."""
    store = noise_store(str(tmp_path_factory.mktemp("labels") / "store"), shape_zyx=(8, 8, 8))
    first = dataclasses.replace(make_scan("case0", (8, 8, 8)), file="/data/first.nii.gz", patient="case1")
    store.update_scan(first)
    return store


@pytest.fixture
def read(store, tmp_path):
    """`read(rows, *columns)` of a CSV with these lines."""

    def read(rows, *columns):
        path = tmp_path / "labels.csv"
        path.write_text("\n".join(rows.split()) + "\n")
        return class_labels.read(str(path), store, columns)

    return read


def test_one_column_names_classes(read):
    labels = read("scan,phase case3,portal /data/first.nii.gz,none case4,portal case2,none")
    assert labels.scans == ("case3", "case0", "case4", "case2") and labels.names == ("none", "portal")
    assert labels.targets.tolist() == [1, 0, 1, 0] and not labels.multi and labels.splits == ()
    assert labels.patients == ("case3", "case1", "case4", "case2")
    assert labels.rows(["case2", "case3"]).tolist() == [3, 0]
    assert labels.counts(np.array([0, 1, 2])) == {"none": (1, 2), "portal": (2, 1)}


def test_several_columns_are_labels_each_for_itself(read):
    labels = read("scan,lesion,split,stent case0,1,train,0 case4,0,test,1 case2,1,train,1 case3,0,train,0")
    assert labels.multi and labels.names == ("lesion", "stent")
    assert labels.targets.tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    assert labels.of_split("train") == ("case0", "case2", "case3") and labels.of_split("validation") == ()


def test_one_of_several_columns_may_be_chosen(read):
    labels = read("scan,phase,lesion case0,x,1 case1,y,0 case2,x,1 case3,y,0", "phase")
    assert labels.names == ("x", "y") and not labels.multi


@pytest.mark.parametrize(
    "rows, message",
    [
        ("case0,1 case1,0", "give a first row of names"),
        ("scan,phase", "give a first row of names"),
        ("scan,phase,phase case0,a,b", "each once"),
        ("scan case0 case1", "has no column of labels"),
        ("scan,phase case0,a,b", "line 2: has 3 values and the first row has 2 names"),
        ("scan,phase case0,a case9,a", "line 3: 'case9' is no scan of the store"),
        ("scan,phase case0,a /data/first.nii.gz,a", "line 3: scan case0 stands in line 2 already"),
        ("scan,phase case0,a case1,", "line 3: phase is empty"),
        ("scan,phase case0,a case1,a", "phase is 'a' everywhere"),
        ("scan,phase case0,a case1,a case2,b", "a single scan is of b"),
        ("scan,x,y case0,1,0 case1,2,1", "line 3: x is '2'; of several labels each is 0 or 1"),
        ("scan,x,y case0,1,0 case1,1,0 case2,0,1 case3,0,0", "a single scan has y"),
        ("scan,x,y case0,1,0 case1,1,1 case2,1,1 case3,1,0", "no scan lacks x"),
        ("scan,x,split case0,1,train case1,0,hold", "line 3: split 'hold'; write train, validation, test"),
        (
            "scan,x,split case2,1,train case0,1,train case3,0,train case1,0,test",
            r"scans case0 \(train\) and case1 \(test\) are of one patient, case1; give all .* the same split",
        ),
    ],
)
def test_mistakes_are_one_line(read, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read(rows)
    assert "\n" not in str(caught.value)


def test_lines_are_counted_as_an_editor_does(store, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("\nscan,phase\ncase0,a\n\n,\ncase9,a\n")
    with pytest.raises(UserError, match="line 6: 'case9' is no scan of the store"):
        class_labels.read(str(path), store)


def test_a_missing_file_and_an_unknown_column(read, store):
    with pytest.raises(UserError, match=r"/nowhere\.csv: cannot be read"):
        class_labels.read("/nowhere.csv", store)
    with pytest.raises(UserError, match="has no label 'stent'; there are phase"):
        read("scan,phase case0,a", "stent")
