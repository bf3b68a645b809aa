"""Kills a function at every system call that it makes, with ptrace (Linux only)."""

import ctypes
import os
import signal
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_TRACESYSGOOD, _EXITKILL = 0x1, 0x100000
_CALL_STOP = signal.SIGTRAP | 0x80

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long


def killed_at_call(action: Callable[[], object], number: int) -> bool:
    """Run `action` in a fork of this process, killed when it enters its `number`-th system call, counted from 1.

    False if it ended before. For a process with one thread; an exception of `action` raises RuntimeError here.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _ptrace(_TRACEME, 0, None, None)
            signal.raise_signal(signal.SIGSTOP)
            action()
            code = 0
        finally:
            os._exit(code)
    os.waitpid(pid, 0)
    if _ptrace(_SETOPTIONS, pid, None, _TRACESYSGOOD | _EXITKILL) == -1:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise OSError(ctypes.get_errno(), "ptrace is not allowed here")
    stops = 0  # two for each call: when it is entered and when it returns
    while True:
        _ptrace(_SYSCALL, pid, None, None)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise RuntimeError(f"the traced function failed at its system call {stops // 2 + 1}")
            return False
        if os.WIFSTOPPED(status) and os.WSTOPSIG(status) == _CALL_STOP:
            stops += 1
            if stops == 2 * number - 1:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return True
