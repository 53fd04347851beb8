"""Processes that meet before JAX joins them: what each says when they do not belong together, or when one goes."""

import signal
import socket

import pytest
from processes import ROOT, finish, flags, free_port, start

from alice_jax import provenance, rendezvous

HOST = socket.gethostname()
MEET = """
import os, sys, time
from alice_jax import cli, errors, rendezvous
place, facts, then = eval(sys.argv[1])
def stop(text):
    cli.complain(errors.UserError(text))
    os._exit(1)
def main():
    company = rendezvous.meet(rendezvous.Place(*place), facts, 3)
    print("met", flush=True)
    began = time.monotonic()
    company.watch(stop)
    if then == "fail":
        company.fail("no more memory", 0)
        return 1
    time.sleep({"wait": 60, "late": 2}.get(then, 0))
    company.part()
    print(time.monotonic() - began > 1.5)
cli.run(main)
"""


def meet(port, count, index, facts=None, then="part"):
    return start("-c", MEET, repr(((f"localhost:{port}", count, index), facts or {}, then)))


@pytest.mark.parametrize("late", [0, 1])
def test_those_who_agree_meet_and_wait_for_the_last_to_part(late):
    port = free_port()
    codes, out, errors = finish([meet(port, 3, index, then="late" if index == late else "part") for index in (2, 1, 0)])
    assert (codes, out, errors) == ([0] * 3, ["met\nTrue\n"] * 3, [""] * 3)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            [(4, 0), (4, 2)],
            "--distributed: 2 of 4 processes (1, 3) did not come to localhost:PORT within 3 s; those that came: "
            f"processes 0 ({HOST}), 2 ({HOST}); see what the missing ones said, and start all again",
        ),
        (
            [(2, 1)],
            "--distributed: process 0 does not answer at localhost:PORT within 3 s (Connection refused); start it "
            "there, or see what it said",
        ),
        ([(3, 0), (3, 1), (3, 1)], f"--process 1: there are two, on {HOST} and {HOST}; number them from 0 to 2"),
    ],
    ids=["missing", "no process 0", "twice"],
)
def test_who_does_not_come_or_comes_wrongly_is_named(places, message):
    port = free_port()
    codes, out, errors = finish([meet(port, count, index) for count, index in places])
    line = f"error: {message.replace('PORT', str(port))}\n"
    assert (codes, out, errors) == ([1] * len(places), [""] * len(places), [line] * len(places))


def test_another_number_is_named_to_those_that_come_later_too():
    port = free_port()
    first, wrong = meet(port, 3, 0), meet(port, 2, 1)
    wrong.wait(timeout=60)
    codes, out, errors = finish([first, wrong, meet(port, 3, 2)])
    line = (
        f"error: --processes: process 1 ({HOST}) was started as one of 2 and process 0 ({HOST}) as one of 3; give all "
        "the same number\n"
    )
    assert (codes, out, errors) == ([1] * 3, [""] * 3, [line] * 3)


def test_who_disagrees_is_named_with_what_they_say():
    port, odd = free_port(), {"--config.batch_size": 16, "jax": "0.12.0"}
    same = {"--config.batch_size": 8, "--config.seed": 0, "jax": "0.10.2"}
    codes, _, errors = finish([meet(port, 3, 0, same), meet(port, 3, 1, same | odd), meet(port, 3, 2, same)])
    line = (
        f"error: --distributed: the processes disagree on --config.batch_size: 8 in processes 0 ({HOST}), 2 ({HOST}), "
        f'16 in process 1 ({HOST}); jax: "0.10.2" in processes 0 ({HOST}), 2 ({HOST}), "0.12.0" in process 1 ({HOST}); '
        "start all with the same command, code and packages\n"
    )
    assert (codes, errors) == ([1] * 3, [line] * 3)


def test_many_are_counted_and_not_listed():
    hellos = [{"index": i, "host": f"h{i}", "facts": {f"f{j}": i // 5 for j in range(9)}} for i in range(10)]
    text = rendezvous.disagreement(hellos)
    assert "f0: 0 in processes 0 (h0), 1 (h1), 2 (h2), 3 (h3), 1 more, 1 in processes 5 (h5)" in text
    assert "f3: " in text and "f4: " not in text and "; and 5 more; start all" in text


@pytest.mark.parametrize("goes", [0, 1])
def test_all_hear_who_died(goes):
    port = free_port()
    running = [meet(port, 3, index, then="wait") for index in range(3)]
    for process in running:
        assert process.stdout.readline() == "met\n"
    running[goes].kill()
    codes, _, errors = finish(running, timeout_s=30)
    line = f"error: process {goes} ({HOST}) has died\n"
    assert codes == [-signal.SIGKILL if index == goes else 1 for index in range(3)]
    assert errors == ["" if index == goes else line for index in range(3)]


def test_all_hear_who_failed_and_why():
    port = free_port()
    codes, _, errors = finish([meet(port, 3, index, then="fail" if index == 2 else "wait") for index in range(3)])
    line = f"error: process 2 ({HOST}) has failed (no more memory)\n"
    assert (codes, errors) == ([1] * 3, [line, line, ""])


def test_strangers_at_the_port_are_passed_over():
    port = free_port()
    first = meet(port, 2, 0)
    for text in b"GET / HTTP/1.0\r\n\r\n", b'{"index": 1}\n', b"[]\n", b"":
        with rendezvous.connected(("localhost", port), 20) as stranger:
            stranger.sendall(text)
    codes, _, errors = finish([first, meet(port, 2, 1)])
    assert codes == [0, 0], errors


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        codes, _, errors = finish([meet(port, 2, 0)])
    reason = "(Address already in use); name a free port"
    line = f"error: --distributed: process 0 cannot listen at localhost:{port} {reason}\n"
    assert (codes, errors) == ([1], [line])


# ---- The training command


def train(port, count, index, *settings, **options):
    command = ["-m", "alice_jax.train", "--config=tests/configs/small.py", "--config.data.store=none", *settings]
    return start(*command, *flags(port, count, index), "--join_timeout_s=60", **options)


def test_hosts_with_other_settings_and_other_code_are_refused(tmp_path):
    package = tmp_path / "alice_jax"
    for file in (ROOT / "alice_jax").rglob("*.py"):
        copy = package / file.relative_to(ROOT / "alice_jax")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes() + b"# changed\n" * (file.name == "losses.py"))
    port = free_port()
    codes, _, errors = finish([train(port, 2, 0), train(port, 2, 1, "--config.batch_size=4", package=tmp_path)])
    assert codes == [1, 1]
    assert errors[0] == errors[1]
    mine = provenance.code()["sources of alice_jax"]
    assert f"disagree on --config.batch_size: 8 in process 0 ({HOST}), 4 in process 1 ({HOST}); " in errors[0]
    assert f'; sources of alice_jax: "{mine}" in process 0 ({HOST}), "' in errors[0]
    assert errors[0].count("\n") == 1
