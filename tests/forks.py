"""Processes of their own, without the seconds that imports take: forked from a server that has imported tirlab and done nothing else."""

import multiprocessing
import os
import sys

import torch
from ports import own_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tirlab.all"])


def _begin(target, args, said, env):
    os.environ.update(env)
    torch.set_num_threads(1)
    if said is not None:
        with open(said, "w") as f:
            for stream in (1, 2): os.dup2(f.fileno(), stream)
    code = target(*args)
    sys.stdout.flush()
    if code: sys.exit(code)


def forked(target, *args, said=None, **env):
    "A process that calls a function of a module; what it says goes to the file `said`."
    process = CONTEXT.Process(target=_begin, args=(target, args, said, env))
    process.start()
    return process


def ended(process, seconds=300):
    "How a process ended: its exit code, or minus the signal; it is killed where it does not."
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def side_by_side(count, target, *args, said):
    "Exit codes of processes that know of each other as those of torchrun do."
    world = dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(own_port()))
    return [ended(p) for p in [forked(target, *args, said=f"{said}-{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(count)]]
