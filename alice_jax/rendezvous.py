"""Where the processes of a run meet before JAX joins them, and hear when one of them goes.

Each process has one TCP connection to process 0, which listens at the coordinator's address until all have come,
compares what they say of themselves, and then leaves the port to JAX. The connections stay: the system closes that of
a process which ends, however it ends, and after KEEPALIVE_S that of a computer which is gone. JAX is not needed here.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from alice_jax.errors import UserError

Hello = dict[str, Any]  # what a process says of itself: index, processes, host, facts
KEEPALIVE_S = 40
_FIRST_PROBE_S, _PROBE_EVERY_S = 10, 5
_HELLO_S = 5.0  # for a stranger at the port that says nothing
_OTHERS_S = 10.0  # for those still on their way when one has come wrongly, so that they hear of it
_LISTED = 4  # processes or fields in a message


@dataclasses.dataclass(frozen=True)
class Place:
    """Of one process in a run."""

    coordinator: str  # HOST:PORT, on which process 0 listens
    processes: int
    index: int

    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


class Link:
    """A connection on which lines of JSON are sent."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._lines = connection.makefile("rb")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", _FIRST_PROBE_S),
            ("TCP_KEEPINTVL", _PROBE_EVERY_S),
            ("TCP_KEEPCNT", (KEEPALIVE_S - _FIRST_PROBE_S) // _PROBE_EVERY_S),
        ):
            if hasattr(socket, option):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # gone; whoever receives will hear
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message; None where the other end is gone, or said nothing or something else."""
        self._socket.settimeout(timeout_s)
        try:
            return json.loads(self._lines.readline(1 << 20))
        except (OSError, ValueError):
            return None
        finally:
            self._socket.settimeout(None)


class Company:
    """The processes of a run, of which process 0 hears of all and the others of it.

    Args:
      me: index of this process.
      hosts: of all processes.
      links: by index of the process at the other end.
    """

    def __init__(self, me: int, hosts: Sequence[str], links: dict[int, Link]):
        self._me, self._hosts, self._links = me, hosts, links
        self._last_word = threading.Lock()  # taken by whoever ends this process, and never given back
        self._failing = False
        self._at_end = threading.Semaphore(0)  # how many at the other ends have come to their end

    def watch(self, stop: Callable[[str], None]) -> None:
        """Calls `stop`, which must end the process, with what has happened to another one."""
        for index, link in self._links.items():
            threading.Thread(target=self._listen, args=(index, link, stop), daemon=True).start()

    def _listen(self, index: int, link: Link, stop: Callable[[str], None]) -> None:
        news = link.receive()
        if news == {}:
            self._at_end.release()
            return
        died = news is None
        if died:
            news = {"text": f"{named([{'index': index, 'host': self._hosts[index]}])} has died"}
        elif self._failing:  # for its own reason, which it can tell better
            return
        with self._last_word:
            self._tell(news, but=index)
            stop(news["text"])

    def _tell(self, news: Any, but: int | None = None) -> None:
        for index, link in self._links.items():
            if index != but:
                link.send(news)

    def fail(self, reason: str, patience_s: float) -> None:
        """Tells the others that this process ends for a reason of its own.

        Args:
          patience_s: how long to wait first for the word that another one has died, which may be the true reason.
        """
        self._failing = True
        time.sleep(patience_s)
        self._last_word.acquire()
        me = named([{"index": self._me, "host": self._hosts[self._me]}])
        self._tell({"text": f"{me} has failed ({reason})"})

    def part(self) -> None:
        """Waits until all have come to their end, however long that takes."""
        if self._me:
            self._tell({})
        for _ in self._links:
            self._at_end.acquire()
        if not self._me:
            self._tell({})


def meet(place: Place, facts: dict[str, Any], timeout_s: float) -> Company:
    """Waits until all processes of the run are there.

    Args:
      facts: what must be the same in all processes, by the name under which a message may mention it; of JSON's types.

    Raises:
      UserError: some do not come in time, or do not belong together; the same in all that have come.
    """
    hello = {"index": place.index, "processes": place.processes, "host": socket.gethostname(), "facts": facts}
    return (_receive_all if place.index == 0 else _report)(place, hello, timeout_s)


def _receive_all(place: Place, mine: Hello, timeout_s: float) -> Company:
    """For process 0."""
    deadline = time.monotonic() + timeout_s
    here, links = {0: mine}, {}
    fault, wrong, expected = "", 0, place.processes
    with _listener(place) as listener:
        while len(here) + wrong < expected:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                fault = fault or absence(place, here, timeout_s)
                break
            link = Link(connection)
            hello = link.receive(_HELLO_S)
            if not isinstance(hello, dict) or set(hello) != set(mine):
                connection.close()  # no process of ours
                continue
            if misplacement := misplaced(hello, here, place.processes):
                if not fault:
                    fault, deadline = misplacement, time.monotonic() + _OTHERS_S
                link.send({"fault": fault})
                wrong, expected = wrong + 1, max(expected, hello["processes"])
            else:
                here[hello["index"]], links[hello["index"]] = hello, link
    fault = fault or disagreement([here[index] for index in sorted(here)])
    hosts = [here[index]["host"] for index in sorted(here)]
    for link in links.values():
        link.send({"fault": fault, "hosts": hosts})
    if fault:
        raise UserError(fault)
    return Company(0, hosts, links)


def _report(place: Place, mine: Hello, timeout_s: float) -> Company:
    """For all but process 0."""
    try:
        link = Link(connected(place.address(), timeout_s))
    except OSError as error:
        raise UserError(
            f"--distributed: process 0 does not answer at {place.coordinator} within {timeout_s:g} s "
            f"({reason(error)}); start it there, or see what it said"
        ) from None
    link.send(mine)
    answer = link.receive()
    if not isinstance(answer, dict):
        raise UserError(
            f"--distributed: process 0 at {place.coordinator} has ended before all had come; see what it said"
        )
    if answer["fault"]:
        raise UserError(answer["fault"])
    return Company(place.index, answer["hosts"], {0: link})


def _listener(place: Place) -> socket.socket:
    """At the coordinator's port, on all addresses of this computer."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", place.address()[1]), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", place.address()[1]))
    except OSError as error:
        raise UserError(
            f"--distributed: process 0 cannot listen at {place.coordinator} ({reason(error)}); name a free port"
        ) from None


def connected(address: tuple[str, int], timeout_s: float) -> socket.socket:
    """A connection to a server that may not be there yet.

    Raises:
      OSError: why the last try failed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.001))
            connection.settimeout(None)
            return connection
        except OSError:
            if time.monotonic() + 0.2 > deadline:
                raise
            time.sleep(0.2)


# ---- What is said


def reason(error: OSError) -> str:
    """In the system's words, without the address that Python adds to some."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def named(processes: Iterable[Hello]) -> str:
    """'process 1 (host)' or 'processes 0 (host), 2 (other)', of many the first few."""
    names = [f"{each['index']} ({each['host']})" for each in processes]
    if len(names) > _LISTED:
        names[_LISTED:] = [f"{len(names) - _LISTED} more"]
    return f"process{'es' * (len(names) > 1)} {', '.join(names)}"


def absence(place: Place, here: dict[int, Hello], timeout_s: float) -> str:
    """That some have not come."""
    missing = [str(index) for index in range(place.processes) if index not in here]
    shown = ", ".join(missing[:_LISTED]) + (" …" if len(missing) > _LISTED else "")
    return (
        f"--distributed: {len(missing)} of {place.processes} processes ({shown}) did not come to {place.coordinator} "
        f"within {timeout_s:g} s; those that came: {named(here.values())}; see what the missing ones "
        "said, and start all again"
    )


def misplaced(hello: Hello, here: dict[int, Hello], processes: int) -> str:
    """What is wrong with the place of one that comes, or ''."""
    if hello["processes"] != processes:
        return (
            f"--processes: {named([hello])} was started as one of {hello['processes']} and {named([here[0]])} as one "
            f"of {processes}; give all the same number"
        )
    if hello["index"] in here:
        return (
            f"--process {hello['index']}: there are two, on {here[hello['index']]['host']} and {hello['host']}; number "
            f"them from 0 to {processes - 1}"
        )
    return ""


def disagreement(hellos: Sequence[Hello]) -> str:
    """On what they do not agree and who says what, or ''."""
    found = []
    for fact in dict.fromkeys(name for hello in hellos for name in hello["facts"]):
        who: dict[str, list[Hello]] = {}
        for hello in hellos:
            who.setdefault(json.dumps(hello["facts"].get(fact)), []).append(hello)
        if len(who) > 1:
            found.append(f"{fact}: " + ", ".join(f"{value} in {named(those)}" for value, those in who.items()))
    if not found:
        return ""
    more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return (
        f"--distributed: the processes disagree on {'; '.join(found[:_LISTED])}{more}; start all with the same "
        "command, code and packages"
    )
