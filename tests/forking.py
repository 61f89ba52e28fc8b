"""Runs a piece of work in a forked process, and stops it there: for the trials of what survives a kill."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_child(
    work: Callable[[], Any], after: float | None = None, send: signal.Signals = signal.SIGKILL
) -> str:
    """Do some work in a forked process, and send it a signal after so many seconds.

    Returns:
        How it ended: "done", "killed", "interrupted", "failed" (an OSError) or "broken".
    """
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # test processes side by side ignore it
        try:
            work()
        except OSError:
            os._exit(3)
        except KeyboardInterrupt:
            os._exit(5)
        except BaseException:  # noqa: BLE001  # a forked process must end here
            traceback.print_exc()
            os._exit(4)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, send)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "done", 3: "failed", 5: "interrupted"}.get(os.WEXITSTATUS(status), "broken")


def die_at(number: int) -> Callable[[], None]:
    """Kill the process at its n-th call that changes the file system."""

    def prepare() -> None:
        calls = 0

        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return counted

        for name in ("replace", "unlink", "rmdir", "mkdir", "write_bytes", "fsync"):
            owner: Any = os if name == "fsync" else Path
            setattr(owner, name, wrap(getattr(owner, name)))

    return prepare
