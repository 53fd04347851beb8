"""One run over several processes: found, compared and joined at the start, and all ended when one of them dies.

--distributed lets JAX find the run's other processes; --coordinator, --processes and --process name them by hand.
"""

import contextlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from jax._src.clusters import ClusterEnv  # private, of jax 0.10.2 to 0.12: how to know the place before joining

from alice_jax import cli, rendezvous
from alice_jax.errors import Stalled, UserError
from alice_jax.rendezvous import Place

JOIN_TIMEOUT_S = 300
# A collective that breaks since a process has died may do so before the word of that death has come.
PATIENCE_S = 5.0
# JAX's own watch over processes that live and do nothing at all, such as one that a debugger stopped.
HEARTBEAT_S = 300

_DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "one run of all processes of this cluster")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where there is no cluster")
_PROCESSES = flags.DEFINE_integer("processes", None, "with --coordinator: of how many processes this is one")
_PROCESS = flags.DEFINE_integer("process", None, "with --coordinator: which of them, from 0")
_TIMEOUT = flags.DEFINE_integer("join_timeout_s", JOIN_TIMEOUT_S, "how long to wait for the other processes")


def by_flags(facts: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """`joined`, if the command line asks for it."""
    coordinator, processes, index = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    if coordinator is None and processes is None and index is None:
        return joined(found(_TIMEOUT.value), facts, _TIMEOUT.value) if _DISTRIBUTED.value else contextlib.nullcontext()
    if coordinator is None or processes is None or index is None:
        raise UserError("--coordinator, --processes, --process: give all three")
    if not 0 <= index < processes:
        raise UserError(f"--process {index}: give 0 to {processes - 1} with --processes {processes}")
    place = Place(coordinator, processes, index)
    try:
        place.address()
    except ValueError:
        raise UserError(f"--coordinator {coordinator}: give HOST:PORT of process 0") from None
    return joined(place, facts, _TIMEOUT.value, by_hand=True)


def found(timeout_s: int = JOIN_TIMEOUT_S) -> Place:
    """This process's place by what its cluster says of it: TPU hosts (of Cloud TPU and of GKE), srun, Open MPI."""
    reason = ""
    try:
        address, processes, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout_s
        )
        if address is not None and processes is not None and index is not None:
            return Place(address, processes, index)
    except (RuntimeError, ValueError, OSError) as error:  # the last of a metadata server that does not answer
        reason = f" ({error})"
    raise UserError(
        f"--distributed: JAX finds no cluster that this process is part of{reason}; start it by srun or by a script of "
        "launch/, or give --coordinator, --processes and --process"
    )


@contextlib.contextmanager
def joined(
    place: Place, facts: dict[str, Any], timeout_s: int = JOIN_TIMEOUT_S, by_hand: bool = False
) -> Iterator[None]:
    """Makes this process one of a run for the time of the block; before JAX has any devices.

    From then on `jax.devices()` are those of all processes. When one of them dies or fails, the others say so in one
    line and exit with 1.

    Args:
      facts: as for `rendezvous.meet`.
      by_hand: whether all devices of this computer are this process's, unless $JAX_LOCAL_DEVICE_IDS says otherwise; a
        cluster may give each process one of them.

    Raises:
      UserError: as for `rendezvous.meet`.
      Stalled: in place of any `UserError` of the block, since JAX would wait for the others at the end.
    """
    company = rendezvous.meet(place, facts, timeout_s)
    company.watch(_stop)
    try:
        jax.distributed.initialize(
            _relay(place, timeout_s) if place.index else place.coordinator,
            place.processes,
            place.index,
            cluster_detection_method="deactivate" if by_hand else None,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
        yield
        company.part()  # JAX would wait for five minutes at most, and process 0 may be writing the report
        jax.distributed.shutdown()
    except KeyboardInterrupt:
        company.fail("stopped by Ctrl-C", 0)
        raise Stalled("stopped by Ctrl-C") from None
    except UserError as error:
        company.fail(str(error), PATIENCE_S)
        raise Stalled(str(error)) from error
    except Exception as error:
        company.fail(type(error).__name__, PATIENCE_S)
        traceback.print_exc()
        os._exit(1)


def _stop(text: str) -> None:
    """Ends this process, whatever its other threads wait for."""
    print(file=sys.stderr)  # after the progress bar
    cli.complain(UserError(f"{text}; all end; what was saved is intact: run the same command again"))
    os._exit(1)


def _relay(place: Place, timeout_s: float) -> str:
    """The address in this process of a way to process 0 that stays open when process 0 is gone.

    JAX aborts a process with a stack trace as soon as its connection to process 0 breaks, and nothing can be said of
    who died before that.
    """

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def serve() -> None:
        while True:
            near, _ = door.accept()
            try:
                far = rendezvous.connected(place.address(), timeout_s)
            except OSError:
                near.close()
                continue
            for ends in (near, far), (far, near):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    door = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{door.getsockname()[1]}"
