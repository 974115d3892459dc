"""Processes of their own, without the seconds that imports take: forked from a copy of this one that has imported everything and run nothing."""

import multiprocessing
import os
import signal
import sys
from typing import Callable

import torch
from ports import own_port

_SERVER: list = []   # the connection to the process that forks, once it runs


def _begin(target, args, said, env):
    os.environ.update(env)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # whoever runs the tests in the background has it ignored, and children inherit that
    if said is not None:
        with open(said, "w") as f:
            for stream in (1, 2): os.dup2(f.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))   # pytest has put others there
    code = target(*args)
    sys.stdout.flush()
    if code: sys.exit(code)


def _serve(asked):
    "Start processes, and tell how they end, until nobody asks any more."
    running = {}
    while True:
        try: what, *rest = asked.recv()
        except EOFError: os._exit(0)
        if what == "start":
            process = multiprocessing.get_context("fork").Process(target=_begin, args=rest)
            process.start()
            running[process.pid] = process
            asked.send(process.pid)
        else:
            pid, seconds = rest
            running[pid].join(seconds)
            asked.send(running[pid].exitcode)


def start_server():
    "Fork the process that forks. tests/conftest.py does it once all tests are imported, while no thread runs."
    if _SERVER: return
    ours, theirs = multiprocessing.Pipe()
    if not os.fork():
        ours.close()
        try: _serve(theirs)
        finally: os._exit(1)
    theirs.close()
    _SERVER.append(ours)


def _ask(*what):
    _SERVER[0].send(what)
    return _SERVER[0].recv()


class Forked:
    "A process that calls a function of a module."
    def __init__(self, pid): self.pid = pid

    def join(self, seconds=None): return _ask("join", self.pid, seconds)   # its exit code, minus the signal, or None while it runs

    def is_alive(self): return self.join(0) is None

    def kill(self): os.kill(self.pid, signal.SIGKILL)


def forked(target: Callable, *args, said=None, **env) -> Forked:
    "A process that calls a function of a module; what it says goes to the file `said`."
    return Forked(_ask("start", target, args, said, env))


def ended(process, seconds=300):
    "How a process ended: its exit code, or minus the signal; it is killed where it does not."
    code = process.join(seconds)
    if code is not None: return code
    process.kill()
    return process.join()


def side_by_side(count, target, *args, said):
    "Exit codes of processes that know of each other as those of torchrun do."
    world = dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(own_port()))
    return [ended(p) for p in [forked(target, *args, said=f"{said}-{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(count)]]
