"""How a command line ends before its time: with one line for the user, and with all that it started."""

import multiprocessing
import signal


class UserError(Exception):
    """Something that the user can put right. Command lines print it as one line, without a traceback."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler, `kill` or a shutdown ends the process. It is Ctrl-C in all but the exit status."""


def catch_sigterm() -> None:
    """Lets SIGTERM raise `Terminated` in this process, once; what follows while the process ends is ignored.

    By default it ends a process on the spot: the workers of its data loaders, busy with filling a queue that nobody
    empties, would stay for good.
    """

    def handler(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # torch's would raise if a worker was told, too
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


def end_children() -> None:
    """Ends the processes that `multiprocessing` started, such as the workers of data loaders, and waits for them."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join()
