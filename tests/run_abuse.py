"""Writers to be abused, each in a process of its own. Their steps are what `trace_rows` makes, so that a reader can compare."""
import os
import random
import resource
from pathlib import Path

from trace_rows import CONTROL, add_steps

from tirlab.traces.run import RunWriter, open_run

META = {"model": "tiny-policy", "control_tokens": CONTROL}


def last_step(path):
    "The last step in the index, 0 if there is none."
    if not (Path(path) / "meta.json").exists():
        return 0
    index = open_run(path).index()
    return int(index.step.max()) if len(index) else 0


def write(path, until=10**9):
    "Go on with a run, or begin one, until killed."
    writer = RunWriter(path, META, resume=True)
    print("up", flush=True)
    for step in range(max(last_step(path), 1), until + 1):   # the last one again: it may be in part
        add_steps(writer, [step])
    writer.close()


def full(path, rounds, seed, place=None):
    "Write while files may not grow beyond a limit that comes at a random moment; when there is room again, go on as a resumed training does."
    rng, (soft, hard), failed = random.Random(seed), resource.getrlimit(resource.RLIMIT_FSIZE), 0
    writer = RunWriter(path, META)
    for step in range(1, rounds + 1):
        add_steps(writer, [step])
        sizes = [f.stat().st_size for f in Path(path).rglob("*") if f.is_file()]
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.choice(sizes) + rng.randrange(4000), hard))
        try:
            add_steps(writer, [step + 1])
        except OSError:
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(Path(path).rglob(".*.tmp")), "a failed write left its temporary file"
        writer = RunWriter(path, META, resume=True)
    add_steps(writer, [rounds + 1])
    writer.close()
    print(failed, flush=True)


def tmpfs(path, rounds, seed):
    "The same on a disk that is really full: a ballast file takes all but a random rest of it."
    rng, failed, ballast = random.Random(seed), 0, Path(path).parent / "ballast"
    writer = RunWriter(path, META)
    for step in range(1, rounds + 1):
        add_steps(writer, [step])
        disk = os.statvfs(path)
        ballast.write_bytes(b"x" * max(disk.f_bavail * disk.f_frsize - rng.randrange(40_000), 0))
        try:
            add_steps(writer, [step + 1])
        except OSError:
            failed += 1
        ballast.unlink()
        assert not list(Path(path).rglob(".*.tmp")), "a failed write left its temporary file"
        writer = RunWriter(path, META, resume=True)
    add_steps(writer, [rounds + 1])
    writer.close()
    print(failed, flush=True)
