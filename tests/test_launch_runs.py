"""The launch scripts from creation to deletion, with stand-ins for gcloud, kubectl and sbatch."""

import os
import pty
import signal
import subprocess
import time

import pytest
from launch_desk import BATCH, EMBED, GKE, PREPARE, RAN, TPU, TRAIN

# ---- TPU VMs

LIST, CREATE, START, INSPECT, LOGS, STOP, DELETE = (
    "queued-resources list",
    "queued-resources create",
    "docker run",
    "docker inspect --format",
    "docker logs --follow",
    "docker stop",
    "queued-resources delete",
)
STEPS = (CREATE, START, LOGS, STOP, DELETE)
GOOD = {LIST: ["", "WAITING_FOR_RESOURCES", "ACTIVE"], INSPECT: ["none", "true 0", "false 0"], LOGS: ["step 1"]}


def test_a_run_is_created_followed_and_deleted(desk):
    desk.answers(GOOD)
    done = desk.run(f"{TPU} -- {TRAIN}")
    assert done.returncode == 0, done.stdout
    assert desk.did(*STEPS) == [CREATE, START, LOGS, DELETE]
    said = "alice: waiting", "alice: ready", "alice: running", "step 1", "alice: succeeded"
    assert [line for line in done.stdout.splitlines() if line in said] == list(said)
    assert (desk.folder / "runs" / "launch" / "alice.log").read_text() == done.stdout


def test_keep_deletes_nothing(desk):
    desk.answers(GOOD)
    assert desk.run(f"{TPU} --keep -- {TRAIN}").returncode == 0
    assert desk.did(*STEPS, "docker rm") == [CREATE, START, LOGS, "docker rm"]  # free for the next command


def test_a_run_that_is_there_is_followed(desk):
    desk.answers({LIST: ["ACTIVE"], INSPECT: ["true 0", "false 0"]})
    assert desk.run(f"{TPU} -- {TRAIN}").returncode == 0
    assert desk.did(*STEPS) == [LOGS, DELETE]


def test_spot_hosts_that_are_taken_away_are_created_again(desk):
    # The first host fails before the queue knows why.
    desk.answers(
        {
            LIST: ["", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"],
            INSPECT: ["none", "false 137", "none", "false 0"],
        }
    )
    done = desk.run(f"{TPU} --spot -- {TRAIN}")
    assert done.returncode == 0, done.stdout
    assert desk.did(CREATE, START, DELETE) == [CREATE, START, DELETE] * 2


def test_a_host_that_was_preempted_counts_as_taken_away(desk):
    queue = ["", "ACTIVE", "ACTIVE", "ACTIVE", "", "ACTIVE"]
    desk.answers(
        {LIST: queue, "tpu-vm list": ["READY 1", "PREEMPTED 1", "READY 1"], INSPECT: ["none", "none", "false 0"]}
    )
    assert desk.run(f"{TPU} --spot -- {TRAIN}").returncode == 0
    assert desk.did(CREATE, START, DELETE) == [CREATE, START, DELETE] * 2


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {
                LIST: ["", "ACTIVE"],
                "tpu-vm list": ["READY 1\\nREADY 1"],
                INSPECT: [
                    "none\\nnone",
                    "true 0\\nfalse 1",
                    "false 0",
                    "false 0\\nfalse 1",
                ],  # one does not answer once
            },
            "error: alice: failed",
        ),
        ({LIST: ["", "ACTIVE", "SUSPENDED"], INSPECT: ["none"]}, "error: alice: its hosts are gone"),
        ({LIST: ["", "FAILED"]}, "error: alice: failed"),
        ({LIST: ["", "ACTIVE"], INSPECT: ["none"], START: ["FAIL"]}, "error: alice: failed"),
        ({LIST: ["", "ACTIVE"], CREATE: ["FAIL"]}, "error: alice: cannot be created"),
    ],
    ids=["command", "no spot", "queue", "start", "create"],
)
def test_a_failure_ends_the_run_and_deletes(answers, message, desk):
    desk.answers(answers)
    done = desk.run(f"{TPU} -- {TRAIN}")
    assert done.returncode == 1
    assert message in done.stdout.splitlines()
    assert desk.did(*STEPS)[-1] == DELETE


def test_what_somebody_deletes_is_not_created_again(desk):
    desk.answers({LIST: ["", "ACTIVE", ""], INSPECT: ["none"]})
    done = desk.run(f"{TPU} --spot -- {TRAIN}")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "error: alice: was deleted")
    assert desk.did(*STEPS) == [CREATE, START]


def test_a_cloud_that_is_out_of_reach_changes_nothing(desk):
    desk.answers({LIST: ["", "FAIL", "ACTIVE"], INSPECT: ["FAIL", "none", "FAIL", "true 0", "false 0"]})
    done = desk.run(f"{TPU} --spot -- {TRAIN}")
    assert done.returncode == 0
    assert done.stdout.count("alice: out of reach") == 2  # the queue and the hosts, then the hosts alone
    assert desk.did(CREATE, START, DELETE) == [CREATE, START, DELETE]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_run_save_and_deletes(number, code, desk):
    desk.answers({LIST: ["", "ACTIVE"], INSPECT: ["none", "true 0"], LOGS: ["WAIT"]})
    with desk.start(f"{TPU} -- {TRAIN}", stdout=subprocess.DEVNULL, start_new_session=True) as process:
        desk.wait_for(LOGS)
        os.killpg(process.pid, number)
        assert process.wait(60) == code
    assert desk.did(STOP, DELETE) == [STOP, DELETE]


def test_a_lost_terminal_changes_nothing(desk):
    desk.answers({LIST: ["", "ACTIVE"], INSPECT: ["none", "true 0"], LOGS: ["step 1"]})
    terminal, end = pty.openpty()
    with desk.start(f"{TPU} -- {TRAIN}", stdin=end, stdout=end, stderr=end, start_new_session=True) as process:
        os.close(end)
        desk.wait_for(LOGS)
        os.close(terminal)
        os.killpg(process.pid, signal.SIGHUP)
        seen = len(desk.calls)
        until = time.time() + 60
        while len(desk.calls) < seen + 5 and time.time() < until:
            time.sleep(0.05)
        desk.answers({LIST: ["ACTIVE"], INSPECT: ["false 0"]})
        assert process.wait(60) == 0
    assert desk.did(*STEPS)[-1] == DELETE
    assert (desk.folder / "runs" / "launch" / "alice.log").read_text().endswith("alice: succeeded\n")


# ---- The other engines

# How each is called, how its state is asked for, what answers running, succeeded and failed, what makes and deletes it.
ENGINES = {
    "gke": (f"{GKE} --tasks=2 -- {PREPARE}", "get job", "alice", "alice Complete", "alice Failed", "apply", "delete"),
    "batch": (f"{BATCH} -- {PREPARE}", "jobs list", "RUNNING", "SUCCEEDED", "FAILED", "jobs submit", "jobs delete"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_job_is_followed_and_deleted(engine, desk):
    line, question, running, good, bad, make, delete = ENGINES[engine]
    for result, code in (good, 0), (bad, 1):
        desk.answers({question: ["", running, running, running, result], "log": ["a line"]})
        done = desk.run(line)
        assert done.returncode == code, done.stdout
        assert "alice: running\na line\n" in done.stdout
        assert delete in desk.calls[-1]
    assert desk.did(make, delete) == [make, delete] * 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_job_that_is_there_is_not_made_again(engine, desk):
    line, question, running, good, _, make, delete = ENGINES[engine]
    desk.answers({question: [running, running, running, good]})
    assert desk.run(line).returncode == 0
    assert desk.did(make, delete) == [delete]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_job_of_which_nothing_is_known_is_left_alone(engine, desk):
    line, question, running, *_, make, delete = ENGINES[engine]
    desk.answers({question: ["FAIL", running]})
    done = desk.run(line)
    assert (done.returncode, done.stdout) == (1, "error: alice: cannot ask for its state\n")
    assert desk.did(make, delete) == []


def test_gke_leaves_alone_what_it_may_not_change(desk):
    """Somebody makes a job of that name between question and `apply`, which refuses to change it."""
    desk.answers({"get job": ["", "alice"], "apply": ["FAIL"]})
    done = desk.run(f"{GKE} --tasks=2 -- {PREPARE}")
    assert (done.returncode, done.stdout) == (1, "error: alice: cannot be created\n")
    assert desk.did("delete") == []


def test_gke_ends_when_somebody_deletes_its_job(desk):
    desk.answers({"get job": ["", "alice", "FAIL", "alice", ""]})
    done = desk.run(f"{GKE} --tasks=2 -- {PREPARE}")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "error: alice: was deleted")
    assert done.stdout.count("alice: out of reach") == 1
    assert desk.did("apply") == ["apply"]


def test_batch_shows_each_line_once_and_late_ones_too(desk):
    """Line b appears after c, and d when the job has ended."""
    a, b, c, d = (f"{line}\\ttask\\t{line}" for line in "abcd")
    answers = a, f"{a}\\n{c}", f"{a}\\n{b}\\n{c}", f"{b}\\n{c}\\n{d}"
    desk.answers({"jobs list": ["", *["RUNNING"] * 4, "SUCCEEDED"], "logging read": answers})
    done = desk.run(f"{BATCH} -- {PREPARE}")
    assert done.returncode == 0
    assert [line[-1] for line in done.stdout.splitlines() if line.startswith("task\t")] == ["a", "c", "b", "d"]
    since = [call.split('timestamp>="')[1][:20] for call in desk.calls if "logging read" in call]
    assert since[-1] <= time.strftime("%FT%TZ", time.gmtime(time.time() - 60))


def test_slurm_cancels_a_job_when_it_is_stopped(desk):
    desk.stand_in("sbatch", '#!/bin/bash\necho "12;cluster"; until [ -e "$DESK/calls" ]; do sleep 0.1; done\n')
    line = f"slurm.sh --name=alice --folder={desk.folder}/shared --poll=1 {desk.project()} -- {TRAIN}"
    with desk.start(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as process:
        for said in process.stdout:
            if "alice: running" in said:
                break
        process.terminate()
        process.stdout.close()
        process.wait(60)
    assert desk.calls == ["scancel 12"]


def test_slurm_says_where_the_logs_of_a_failed_job_are(desk):
    desk.stand_in("sbatch", '#!/bin/bash\necho 12; echo "a reason" > "$DESK/shared/logs/alice-12.log"; exit 3\n')
    done = desk.run(f"slurm.sh --name=alice --folder={desk.folder}/shared -- {TRAIN}", desk.project())
    assert done.returncode == 1
    assert f"a reason\nerror: alice: failed; the logs are in {desk.folder}/shared/logs\n" in done.stdout


def test_slurm_says_that_a_job_was_not_submitted(desk):
    desk.answers({"sbatch": ["FAIL"]})
    done = desk.run(f"slurm.sh --name=alice --folder={desk.folder}/shared -- {TRAIN}", desk.project())
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "error: alice: was not submitted")
    assert desk.did("scancel") == []


def test_slurm_runs_each_task_of_an_array(desk):
    desk.stand_in(
        "sbatch",
        '#!/bin/bash\necho 12; cd "$DESK"; SLURM_ARRAY_TASK_ID=0 bash -s > shared/logs/alice-12_0.log 2>&1; exit $?\n',
    )
    done = desk.run(f"slurm.sh --name=alice --folder={desk.folder}/shared --tasks=9 -- {EMBED}", desk.project())
    assert done.returncode == 0, done.stdout
    assert "extra: \n" in done.stdout
    assert [line for line in done.stdout.splitlines() if line in RAN] == RAN
    assert "--task-index=0\n--task-count=9\n" in done.stdout
    assert desk.did("scancel") == []
