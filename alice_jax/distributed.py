"""One run over several processes, which find each other by what their cluster says of them."""

import jax

from alice_jax.errors import UserError


def join(timeout_s: int = 300) -> None:
    """Makes this process one of a run; before JAX has any devices.

    JAX recognises TPU hosts (of Cloud TPU and of GKE), the tasks of srun, and Open MPI. From then on `jax.devices()`
    are those of all processes. Where they do not all come in time, JAX aborts those that did (DEADLINE_EXCEEDED, exit
    code 134).

    Args:
      timeout_s: how long to wait for the other processes.

    Raises:
      UserError: there is no such cluster.
    """
    try:
        jax.distributed.initialize(initialization_timeout=timeout_s)
    except ValueError as error:  # an address or a number that no cluster has told
        raise UserError(
            f"--distributed: JAX finds no cluster that this process is part of ({error}); start it by srun or by a "
            "script of launch/, or leave the flag out"
        ) from None
