"""Two processes on this machine that compute together: for several tests."""

import os
import signal
import socket
import time
from collections.abc import Callable

import torch

from support import tiny


def pair(job: Callable[[int], object]) -> list[int]:
    """Runs a job in two processes, with the variables that `torchrun` sets; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> int:
        def run() -> None:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            os.environ |= {name: str(value) for name, value in variables.items()}
            job(rank)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

        pid = os.fork()
        if pid == 0:
            os._exit(tiny.in_child(run) % 256)
        return pid

    codes: dict[int, int] = {}
    children = [child(rank) for rank in range(2)]
    late = time.monotonic() + 180
    while len(codes) < 2:  # Processes that wait for one another would wait forever.
        for pid in children:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
            elif pid not in codes and time.monotonic() > late:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in children]
