"""`serve` and `serve-policy`: a server for one model, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from internvideo3.harness.ask import AskOptions, agent_of, load_place, sight_of
from internvideo3.harness.serving.hosts import of_this_machine


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to serve, where, and to whom."""

    asking: AskOptions
    """The model, and how questions are answered; its video, question and folder are not used."""
    host: str = "127.0.0.1"
    """Address to listen at; one that is not of this machine alone needs a token."""
    port: int = 8000
    """0 for any that is free."""
    name: str = ""
    """What clients call the model; empty for the model's own name."""
    folder: Path | None = None
    """Whose videos may be asked about; None for uploads only."""
    token_variable: str | None = None
    """Environment variable with the token that clients must bring."""
    upload_mb: int = 64
    """Most mebibytes of a request."""
    waiting: int = 8
    """Most requests that wait while one is answered."""
    reasoning: bool = True
    """Whether the agent's turns are sent, as `reasoning_content`."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """Which policy or teacher to serve to trainers, where, and to whom."""

    model: str
    """Checkpoint folder or name."""
    host: str = "127.0.0.1"
    """Address to listen at; one that is not of this machine alone needs a token."""
    port: int = 8001
    """0 for any that is free."""
    weights: Path | None = None
    """Folder below which trainers may name new weights; None: the weights stay."""
    token_variable: str | None = None
    """Environment variable with the token that clients must bring."""
    upload_mb: int = 1024
    """Most mebibytes of a request."""
    device: str | None = None
    """torch device; None for CUDA if there is one."""
    dtype: str = "float32"
    """As a trainer's weights are, so that both find the same probabilities."""
    threads: int = 1
    """CPU threads of torch."""


def serve_policy(options: PolicyOptions, tell: Callable[[str], None]) -> None:
    """Serves a policy to trainers until it is told to stop.

    Args:
        options: what to serve.
        tell: told where it listens.

    Raises:
        ValueError: the options do not fit together, a package is missing, or the model cannot be
            read.
        OSError: the port is taken.
    """
    token = _token(options.token_variable)
    _check(options.host, options.weights, "--weights", token)
    with suppress(KeyboardInterrupt), closing(_listen(options.host, options.port)) as listening:
        import torch

        from internvideo3.harness.serving.policy import PolicyServing
        from internvideo3.harness.serving.server import Server
        from internvideo3.training.served import ServedPolicy

        torch.set_num_threads(options.threads)
        serving = PolicyServing(
            policy=ServedPolicy(options.model, options.device, options.dtype),
            name=Path(options.model).name, weights=options.weights, token=token,
            upload_bytes=options.upload_mb << 20,
        )  # fmt: skip
        tell(f"Serving the policy {serving.name} at {_address(listening)}/v1")
        Server(serving).run_until_told(listening)


def serve(options: ServeOptions, tell: Callable[[str], None]) -> None:
    """Serves until it is told to stop.

    Args:
        options: what to serve.
        tell: told where it listens.

    Raises:
        ValueError: the options do not fit together, a package is missing, or the model cannot be
            read.
        OSError: the port is taken.
    """
    token = _token(options.token_variable)
    _check(options.host, options.folder, "--folder", token)
    # Before it serves, nothing is there to be ended but itself.
    with suppress(KeyboardInterrupt), closing(_listen(options.host, options.port)) as listening:
        _serve(options, token, listening, tell)


def _serve(
    options: ServeOptions, token: str | None, listening: socket.socket, tell: Callable[[str], None]
) -> None:
    from internvideo3.harness.agent.tools.catalogue import TOOLS, cache_folder
    from internvideo3.harness.agent.tools.desk import Desk
    from internvideo3.harness.serving.app import Serving
    from internvideo3.harness.serving.jobs import Line
    from internvideo3.harness.serving.server import Server
    from internvideo3.harness.serving.studio import Studio
    from internvideo3.tasks.decoder import IsolatedReader
    from internvideo3.tasks.video import TIME_LIMIT_S

    asking = options.asking
    desk = Desk(TOOLS, asking.cache or cache_folder())
    # What lengths a caller's file claims gives it no more time.
    with closing(IsolatedReader(time_limit_s=TIME_LIMIT_S)) as reader, desk:
        studio = Studio(
            place=load_place(asking, desk), sight=sight_of(asking), reader=reader,
            agent=agent_of(asking), threads=asking.threads,
        )  # fmt: skip
        line = Line(options.waiting, studio.interrupt)
        serving = Serving(
            studio=studio, line=line, name=options.name or Path(asking.model).name,
            folder=options.folder, token=token, upload_bytes=options.upload_mb << 20,
            new_tokens=asking.max_new_tokens, reasoning=options.reasoning,
        )  # fmt: skip
        tell(f"Serving {serving.name} at {_address(listening)}/v1")
        Server(serving).run_until_told(listening)


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(f"the environment variable {variable} is empty; put the token there.")
    return token


def _check(host: str, folder: Path | None, option: str, token: str | None) -> None:
    """Refuses what cannot work, before weights are read."""
    import importlib.util

    missing = [one for one in ("starlette", "uvicorn") if importlib.util.find_spec(one) is None]
    if missing:
        raise ValueError(
            f"serving needs {' and '.join(missing)}: pip install 'internvideo3[serve]'."
        )
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; {option} names one that is there.")
    if token is None and not of_this_machine(host):
        raise ValueError(
            f"--host {host} lets other machines ask. Give a token by --token-variable, or "
            "leave --host at 127.0.0.1."
        )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(
            f"cannot listen at {host} port {port}: {error}. Give another --port."
        ) from None
