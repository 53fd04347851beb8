"""The command: which files of a folder or a data set are scans, and what they are called."""

import json
import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from prepare_command import ids, reasons, report_of
from test_readers import AFFINE, ct_like, itk_image, write_dicom, write_nifti

from alice_jax.data.store import Store

pytestmark = pytest.mark.usefixtures("in_this_process")


def test_folders_ids_and_patients(tmp_path, capsys):
    data = tmp_path / "my data v1.2" / "ünï 患者"
    cases = {
        "case.one/ct.nii.gz": "case_one",
        "case.two/CT.NII": "case_two",
        "deep/er/scan one.nii.gz": "deep-er-scan_one",
        "deep/er/scan.one.nii.gz": "deep-er-scan_one-",  # the same letters: told apart by a hash
        "a.mha": "a",
    }
    for seed, name in enumerate(cases):
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".mha"):
            sitk.WriteImage(itk_image(ct_like(seed=seed)), str(path))
        elif name.endswith("NII"):
            nib.Nifti1Image(ct_like(seed=seed), AFFINE).to_filename(path.with_suffix(".nii"))
            path.with_suffix(".nii").rename(path)
        else:
            write_nifti(path, ct_like(seed=seed))
    write_nifti(data / "case.one" / "late.nii.gz", ct_like(seed=9))
    write_nifti(data / "case.one" / "labels.nii.gz", (ct_like() > 0).astype(np.uint8))
    write_dicom(data / "患者 7", itk_image(ct_like(seed=7)))
    (data / "notes.txt").write_text("hello")
    (data / "more.zip").write_bytes(b"PK")
    os.symlink(data / "nowhere", data / "gone.nii.gz")
    os.symlink(data, data / "deep" / "loop")
    os.mkfifo(data / "pipe")
    os.mkfifo(data / "pipe.nii.gz")
    code, report = report_of(tmp_path, data)
    found = {os.path.relpath(entry["file"], data): entry["id"] for entry in report["prepared"]}
    assert code == 0 and found.keys() == {*cases, "case.one/late.nii.gz", "患者 7"}
    for name, id in cases.items():
        assert found[name] == id or (id.endswith("-") and found[name].startswith(id))
    assert len(set(found.values())) == len(found) and all(id.isascii() for id in found.values())
    assert reasons(report) == {"labels.nii.gz": "not a CT intensity range", "gone.nii.gz": "missing"}
    store = Store.open(tmp_path / "store")
    assert store.scan("case_one-late").patient == store.scan("case_one").patient == "case_one"
    assert store.scan(found["患者 7"]).patient.startswith("dicom-")
    printed = capsys.readouterr().out
    assert (
        ".txt 1, .zip 1, devices and pipes 2" in printed
        and "orientation of the files" in printed
        and "such scans need" in printed
    )


def test_a_list_of_paths(tmp_path):
    write_nifti(tmp_path / "a b.nii.gz", ct_like())
    write_nifti(tmp_path / "sub" / "c.nii.gz", ct_like(seed=1))
    listing = tmp_path / "lists" / "train.txt"
    listing.parent.mkdir()
    listing.write_text(f"# a comment\n../a b.nii.gz\n\n{tmp_path}/sub\n../gone.nii.gz\n../lists/train.txt\n")
    code, report = report_of(tmp_path, listing)
    assert code == 0 and ids(report) == ["a_b", "c"]
    assert reasons(report) == {"gone.nii.gz": "missing", "train.txt": "unreadable"}


def test_one_file(tmp_path):
    write_nifti(tmp_path / "patient 5" / "ct.nii.gz", ct_like())
    assert ids(report_of(tmp_path, tmp_path / "patient 5" / "ct.nii.gz")[1]) == ["patient_5"]


def test_decathlon_and_nnunet_take_images_and_not_labels(tmp_path):
    data = tmp_path / "Task03"
    for seed, name in enumerate(["imagesTr/liver_0", "imagesTr/liver_1_0000", "imagesTs/liver_2", "imagesTr/extra"]):
        write_nifti(data / f"{name}.nii.gz", ct_like(seed=seed))
    write_nifti(data / "labelsTr" / "liver_0.nii.gz", ct_like(seed=8))
    write_nifti(data / "other.nii.gz", ct_like(seed=9))
    dataset = {
        "training": [
            {"image": "./imagesTr/liver_0.nii.gz", "label": "./labelsTr/liver_0.nii.gz"},
            {"image": "./imagesTr/liver_1.nii.gz", "label": "./labelsTr/liver_1.nii.gz"},  # stored with its channel
            {"image": "./imagesTr/gone.nii.gz"},
            {"image": "../../../etc/passwd"},
            {"image": "/etc/passwd"},
            {"image": "./imagesTr/../../other.nii.gz"},
            {"image": "nul\0byte.nii.gz"},
            {"image": 7},
            "text",
        ],
        "test": ["./imagesTs/liver_2.nii.gz"],
    }
    (data / "dataset.json").write_text(json.dumps(dataset))
    for source, store in ((data, "store"), (data / "dataset.json", "store2"), (tmp_path, "store3")):
        code, report = report_of(tmp_path, source, store=store)
        assert code == 0 and sorted(ids(report)) == ["extra", "liver_0", "liver_1", "liver_2"]
        names = [entry["reason"].split(":")[0] for entry in report["quarantined"]]
        assert sorted(names) == ["missing"] * 4 + ["outside the data set"] * 3


def test_nnunet_2_lists_nothing(tmp_path):
    write_nifti(tmp_path / "d" / "imagesTr" / "case_007_0000.nii.gz", ct_like())
    write_nifti(tmp_path / "d" / "labelsTr" / "case_007.nii.gz", ct_like(seed=3))
    dataset = {"channel_names": {"0": "CT"}, "labels": {}, "numTraining": 1, "file_ending": ".nii.gz"}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(dataset))
    assert ids(report_of(tmp_path, tmp_path / "d")[1]) == ["case_007"]


@pytest.mark.parametrize("text", ["{", "[]", '{"training": 5}', '{"name": "x"}', "[" * 99999])
def test_a_strange_dataset_json_does_not_stop_the_search(tmp_path, text):
    write_nifti(tmp_path / "d" / "imagesTr" / "a.nii.gz", ct_like())
    (tmp_path / "d" / "dataset.json").write_text(text)
    code, report = report_of(tmp_path, tmp_path / "d")
    assert code == 0 and ids(report) in (["a"], ["imagesTr-a"])


def test_a_dataset_json_that_is_a_pipe_is_not_waited_for(tmp_path):
    write_nifti(tmp_path / "d" / "a.nii.gz", ct_like())
    os.mkfifo(tmp_path / "d" / "dataset.json")
    assert ids(report_of(tmp_path, tmp_path / "d")[1]) == ["a"]


def test_a_dataset_json_of_gigabytes_is_not_read(tmp_path):
    write_nifti(tmp_path / "d" / "a.nii.gz", ct_like())
    (tmp_path / "d" / "dataset.json").write_text("{}")
    os.truncate(tmp_path / "d" / "dataset.json", 2**32)
    code, report = report_of(tmp_path, tmp_path / "d")
    assert code == 0 and ids(report) == ["a"] and reasons(report) == {"dataset.json": "unreadable"}
