"""Does a chief answer where the workers of a search will ask? KerasTuner waits an hour for one that does not."""

import os
import socket
import time
from typing import Any

from keras_kd._tunable import positive

_IP, _PORT, _ID = "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID"


def check_chief(address: str | None = None, *, timeout: float = 15.0) -> str | None:
    """Waits until the chief of a search answers, or says within seconds that it does not.

    Call it in the script that chief and workers share, before the tuner is made. By KerasTuner's environment variables it knows
    what it runs in. In a worker it asks the chief for its search space, and again until `timeout`: the chief may just be starting.
    In the chief it checks that nobody listens on the port already, since two chiefs would share the workers between them. In a
    search on one machine it does nothing.

    Args:
        address: `"host:port"` of a chief to ask. None takes `KERASTUNER_ORACLE_IP` and `KERASTUNER_ORACLE_PORT`.
        timeout: seconds until it gives up.

    Returns:
        The address; None in a search on one machine.

    Raises:
        ValueError: if `address` is none, or some of the environment variables are missing.
        ConnectionError: if nobody answers, or somebody who is no chief; in the chief, if the port is taken.

    Example:

    >>> try:
    ...     keras_kd.tuner.check_chief("127.0.0.1:1", timeout=0.1)
    ... except ConnectionError as error:
    ...     print(str(error).split(".")[0])
    No chief answers at 127
    """
    timeout = float(positive("timeout", timeout))
    if address is not None:
        host, port = split(address)
        _ask(host, port, timeout)
        return address
    found = {name: os.environ[name] for name in (_IP, _PORT, _ID) if os.environ.get(name)}
    if not {_IP, _PORT} & found.keys():
        return None
    if missing := [name for name in (_IP, _PORT, _ID) if name not in found]:
        raise ValueError(
            f"KerasTuner's chief and workers need the environment variables {_IP}, {_PORT} and {_ID}. Received: no "
            f'{", ".join(missing)}. {_ID} is "chief" for the chief, and another name for each worker.'
        )
    host, port = split(f"{found[_IP]}:{found[_PORT]}")
    if "chief" in found[_ID]:  # KerasTuner's own rule
        _check_free(host, port)
    else:
        _ask(host, port, timeout)
    return f"{host}:{port}"


def split(address: Any) -> tuple[str, int]:
    """Host and port of an address.

    Args:
        address: `"host:port"`.

    Raises:
        ValueError: if it is no such text.
    """
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f'The address of a chief must be "host:port". Received: address={address!r}.')
    return host, int(port)


def _ask(host: str, port: int, timeout: float) -> None:
    """Returns when a chief has answered."""
    end = time.monotonic() + timeout
    while True:
        problem = _connects(host, port, max(0.1, min(5.0, end - time.monotonic())))
        # gRPC, with its threads, is started only where somebody listens.
        problem = problem or _answers(host, port, max(0.5, min(5.0, end - time.monotonic())))
        if problem is None:
            return
        if time.monotonic() + 0.2 >= end:
            raise ConnectionError(
                f"No chief answers at {host}:{port}. Received in {timeout:g} seconds: {problem}. Start the chief first "
                f"({_ID}=chief, with {_IP} and {_PORT} of an address that this machine reaches), and look at its output; a proxy "
                "in the environment (http_proxy) catches these calls too, unless no_proxy names the host."
            )
        time.sleep(0.2)


def _connects(host: str, port: int, seconds: float) -> str | None:
    """What is wrong with the plainest connection; None if nothing."""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return None
    except OSError as error:
        return str(error)


def _answers(host: str, port: int, seconds: float) -> str | None:
    """What is wrong with the answer to a question that only a chief knows; None if nothing."""
    import grpc
    from keras_tuner.src import protos  # KerasTuner has no public way to ask with a limit of time

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        stub = protos.get_service_grpc().OracleStub(channel)
        try:
            stub.GetSpace(protos.get_service().GetSpaceRequest(), timeout=seconds, wait_for_ready=False)
        except grpc.RpcError as error:
            return f"somebody listens, who is no chief ({error.code().name.lower()}: {error.details()})"
    return None


def _check_free(host: str, port: int) -> None:
    """Raises where the chief's server could not be the only one on its port."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise ConnectionError(
                f"The chief cannot listen on {host}:{port}: {error}. {_IP} must be an address of the chief's own machine, and the "
                "port free: is another chief running?"
            ) from error
