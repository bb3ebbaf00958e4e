"""Loading workers obey the process that started them, and nobody else."""

import multiprocessing
import os
import signal
import threading


def ignore_signals(worker: int) -> None:
    """Makes a loading worker ignore signals that are meant for the run as a whole.

    A terminal sends Ctrl+C to every process in the foreground, a scheduler its SIGTERM to every process of a job. A
    worker that died of it would end the run before it is saved. Where the sender of a signal can be asked for (Linux),
    SIGTERM counts if it is the parent's, which so ends workers that it no longer needs.

    Args:
        worker: The worker's number, which a DataLoader passes on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, name=f"signals-{worker}", daemon=True).start()


def _obey_parent() -> None:
    # Not os.getppid(): that is the fork server where one does the forking, as is the default from Python 3.14 on.
    parent = multiprocessing.parent_process()
    assert parent is not None
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent.pid:
            os._exit(0)
