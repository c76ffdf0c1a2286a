"""Keeps a run from leaving programs on the GPU when the run itself is killed."""

import os
import signal
import sys

import process

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def guard() -> None:
    """Continues in a child process. The parent waits for the child, ends the processes that the
    child leaves, and exits with the child's status.

    The child is interrupted by the signals of `STOP` to either process, and if this process or its
    parent is killed. Both have a session of their own, so a signal to the caller's process group
    does not reach them.
    """
    process.adopt_orphans()
    process.end_with_parent(signal.SIGTERM)
    if os.getpid() != os.getpgrp():
        os.setsid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        process.end_with_parent(signal.SIGTERM)
        for number in STOP:
            signal.signal(number, process.interrupt)
        process.adopt_orphans()
        return
    for number in STOP:
        signal.signal(number, lambda *_: os.kill(child, signal.SIGTERM))
    ended = 0
    # Orphans that were adopted are children too.
    while ended != child:
        ended, status = os.waitpid(-1, 0)
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
    process.end_descendants(grace=0)
    code = os.waitstatus_to_exitcode(status)
    # The exit status that shells use for a signal.
    sys.exit(code if code >= 0 else 128 - code)
