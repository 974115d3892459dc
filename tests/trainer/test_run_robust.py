"""A reader beside a writer, writers that are killed or run out of disk, and files of every kind that are not what they should be.

In `make test` these are short. At full length (5 minutes beside a writer, 50 kills, 50 full disks):

    pytest -m slow tests/trainer/test_run_robust.py
"""
import errno
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import run_abuse
from forks import ended, forked
from run_abuse import last_step
from trace_rows import add_steps, make_row, make_run

from tirlab.traces.annotations import read_alarms, read_bookmarks
from tirlab.cli.main import main
from tirlab.plots.export import export_html
from tirlab.traces.files import WriteError
from tirlab.traces.recorder import Recorder
from tirlab.traces.rows import write_scored
from tirlab.traces.terminal import overview
from tirlab.traces.run import RunError, RunWriter, open_run, trace_id
from tirlab.core.trajectory import StopReason, Trajectory, Turn, TurnKind

def said_by(path): return Path(f"{path.parent}.said")   # beside the folder, which may be a disk that is full


def start(kind, path, *numbers):
    "A writer in a process of its own."
    said_by(path).unlink(missing_ok=True)
    return forked(getattr(run_abuse, kind), str(path), *numbers, said=said_by(path))


def begun(kind, path):
    "A writer that has begun."
    writer, end = start(kind, path), time.monotonic() + 120
    while not (said_by(path).exists() and said_by(path).read_text() == "up\n"):
        assert writer.is_alive() and time.monotonic() < end
        time.sleep(0.005)
    return writer


def same_row(row):
    "Whether a row is, to the last token, the one that `trace_rows.add_steps` wrote."
    number = int(row.id.rsplit("-", 1)[1])
    want = make_row(row.step, number, skill=0.35 + 0.55 * (1 - np.exp(-row.step / 8)))
    assert row.id == want.id and row.text == want.text and row.reward == want.reward and row.stop == want.stop
    for name in ("ids", "mask", "turn", "logprob", "entropy", "advantage", "sampling_logprob"):
        np.testing.assert_array_equal(getattr(row, name), getattr(want, name), err_msg=f"{row.id} {name}")


def whole(run, sample=None, seed=0):
    "Check everything that can be read of a run: nothing skipped, no torn row, contents as written."
    metrics, steps, index = run.metrics(), run.steps(), run.index()   # against the order of writing, so that each is in the next
    assert run.skipped == 0 and index.id.is_unique and (index.tokens > 0).all()
    ids = index.id.tolist()
    for name in ids if sample is None else random.Random(seed).sample(ids, min(sample, len(ids))):
        same_row(run.trajectory(name))
    assert set(steps.step) <= set(index.step) and set(metrics.step) <= set(index.step)
    return index


def beside_a_writer(path, seconds):
    writer = begun("write", path)
    try:
        kept, seen, rounds, end = open_run(path), 0, 0, time.monotonic() + seconds
        while time.monotonic() < end:
            index = whole(kept, sample=3, seed=rounds)
            assert len(index) >= seen and len(kept.steps()) >= len(index) // 8 - 1
            if len(index):                                    # the newest is whole as soon as it is named
                same_row(kept.trajectory(index.id.iloc[-1]))
            if rounds % 10 == 0:
                whole(open_run(path), sample=1, seed=rounds)
            assert kept.status() == "running"
            seen, rounds = len(index), rounds + 1
        assert writer.is_alive() and seen > 16
    finally:
        writer.kill()
        ended(writer)
    return seen, rounds


def test_a_reader_beside_a_writer(tmp_path):
    beside_a_writer(tmp_path / "run", 2)


@pytest.mark.slow
def test_a_reader_beside_a_writer_for_five_minutes(tmp_path):
    seen, rounds = beside_a_writer(tmp_path / "run", 300)
    print(f"{rounds} looks at a run that grew to {seen} trajectories")
    whole(open_run(tmp_path / "run"))


def kills(path, times, seed=0):
    rng, kept = random.Random(seed), None
    for _ in range(times):
        before = last_step(path)
        writer = begun("write", path)
        time.sleep(rng.random() * 0.5)
        writer.kill()
        assert ended(writer) == -9
        kept = kept or open_run(path)
        for run in (kept, open_run(path)):                    # one that was open all along, one opened on the ruins
            index = whole(run, sample=4, seed=rng.random())
            assert len(index) == 0 or index.step.max() >= before
    last = last_step(path)
    assert ended(start("write", path, last + 2)) == 0         # and on to the end
    index = whole(kept)
    assert sorted(index.id) == [trace_id(s, 0, i) for s in range(1, last + 3) for i in range(8)]
    assert kept.status() == "finished" and not list(path.rglob(".*.tmp"))
    steps = open_run(path).steps()
    assert steps.step.tolist() == list(range(1, last + 3)) and (steps.trajectories == 8).all()


def test_a_writer_killed_at_random(tmp_path):
    kills(tmp_path / "run", 4)


@pytest.mark.slow
def test_a_writer_killed_at_random_fifty_times(tmp_path):
    kills(tmp_path / "run", 50)


def fills(kind, path, rounds, seed=0):
    assert ended(start(kind, path, rounds, seed), 600) == 0
    out = said_by(path).read_text()
    assert int(out) > rounds / 4, "the disk was hardly ever full, so nothing was tested"
    run = open_run(path)
    index = whole(run)
    assert sorted(index.id) == [trace_id(s, 0, i) for s in range(1, rounds + 2) for i in range(8)] and run.status() == "finished"
    assert run.steps().trajectories.sum() == len(index) and set(run.metrics().step) == set(index.step)
    return int(out)


def test_a_disk_that_fills_up(tmp_path):
    fills("full", tmp_path / "run", 12)


@pytest.mark.slow
def test_a_disk_that_fills_up_fifty_times(tmp_path):
    for seed in range(5):
        fills("full", tmp_path / f"run-{seed}", 50, seed)


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root; the same is tested with a limit on the size of files")
    try:
        fills("tmpfs", tmp_path / "run", 50)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.fixture
def small_disk(tmp_path):
    "A folder on a disk of 1 MB, and what fills it to the last byte."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root; the same is tested with a limit on the size of files")

    def fill():
        with open(disk / "ballast", "wb", buffering=0) as f:
            try:
                while True:
                    f.write(b"x" * 512)
            except OSError:
                pass
    yield disk, fill
    subprocess.run(["umount", "-l", disk], check=True)   # lazily: a write that failed may hold its file until it is collected


def test_a_full_disk_is_named_and_the_run_has_failed(small_disk):
    disk, fill = small_disk
    writer = make_run(disk / "run", steps=2, status="running")
    fill()
    for write in (lambda: add_steps(writer, [3]), lambda: writer.log(3, {"note": 1.0} | {f"m{i}": 0.5 for i in range(2000)}), lambda: writer.beat(3, force=True)):
        with pytest.raises(OSError) as e:
            write()
        said = str(e.value)
        assert isinstance(e.value, WriteError) and said.startswith(str(disk / "run")) and "(No space left on device): make room there" in said and said.endswith(".") and "\n" not in said
    writer.close("failed", said)
    run = open_run(disk / "run")
    whole(run)
    assert run.status() == "failed" and run.meta()["error"] == said and set(run.index().step) == {1, 2}
    (disk / "ballast").unlink()
    writer = RunWriter(disk / "run", {}, resume=True)
    add_steps(writer, [3])
    writer.close()
    assert len(whole(run)) == 24 and run.status() == "finished"


def test_what_waits_for_a_full_disk_is_written_when_there_is_room(small_disk):
    disk, fill = small_disk
    turn = Turn(ids=[5, 6], message={"role": "assistant", "content": "x"}, kind=TurnKind.RESPONSE)
    recorder = Recorder(RunWriter(disk / "run", {}), SimpleNamespace(decode=lambda ids: f"<{ids[0]}>"))
    add = lambda step: recorder.add([Trajectory([1], [turn] * 400, StopReason.ANSWER)] * 20, [dict(id=trace_id(step, 0, i), step=step, split="train", reward=1.0) for i in range(20)])
    add(1)
    recorder.write()
    fill()
    add(2)
    with pytest.raises(OSError, match="make room"):
        recorder.write()
    assert len(recorder.waiting) == 20
    (disk / "ballast").unlink()
    recorder.write()
    assert open_run(disk / "run").steps().trajectories.tolist() == [20, 20]
    fill()
    add(3)
    with pytest.raises(OSError, match="make room"):
        recorder.close()
    run = open_run(disk / "run")
    assert run.status() == "failed" and "make room" in run.meta()["error"] and len(run.index()) == 40 and run.skipped == 0


def test_an_import_to_a_full_disk(small_disk, tmp_path, capsys):
    disk, fill = small_disk
    rows = [dict(input="q", output="word " * 50_000, score=1.0, step=s, info=random.Random(s).randbytes(200_000).hex()) for s in range(6)]
    (tmp_path / "source").mkdir()
    for s, row in enumerate(rows):
        (tmp_path / f"source/{s}.jsonl").write_text(json.dumps(row))
    assert main(["trace", "import", str(tmp_path / "source"), "--out", str(disk / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    run = open_run(disk / "run")
    assert "cannot be written (No space left on device): make room there" in said and run.status() == "failed" and 0 < len(run.index()) < 6 and run.skipped == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOENT, errno.EDQUOT, errno.EIO])
def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch, number):
    writer = make_run(tmp_path / "run", steps=1, status="running")

    def refuse(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "replace", refuse)
    for path, write in ((tmp_path / "run/tokens", lambda: add_steps(writer, [2])), (tmp_path / "run/meta.json", lambda: writer.beat(2, force=True)), (tmp_path / "page.html", lambda: export_html(open_run(tmp_path / "run"), tmp_path / "page.html", id=trace_id(1, 0, 0)))):
        with pytest.raises(OSError) as e:
            write()
        advice = "make room there" if number == errno.EDQUOT else "give a place you may write to"
        assert str(e.value).startswith(str(path)) and f"({os.strerror(number)}): {advice}" in str(e.value)


# -- files that are not what they should be

def full_run(path):
    "A run with every kind of file."
    make_run(path, steps=3)
    index = open_run(path).index()
    (path / "scores/last").mkdir(parents=True)
    for file, part in index.groupby("file"):
        write_scored(path / "scores/last" / file, part.id.tolist(), [np.zeros(int(n)) for n in part.tokens])
    (path / "scores/last/scores.json").write_text('{"model": "m", "finished": 1.0}')
    (path / "alarms.jsonl").write_text('{"step": 2, "signal": "entropy", "value": 1.0, "usual": 0.1, "score": 2.0, "culprits": []}\n')
    (path / "bookmarks.json").write_text('{"000001-0-000": {"note": "odd", "view": "", "time": 1.0}}')


FILES = ["meta.json", "index.jsonl", "metrics.jsonl", "steps.jsonl", "alarms.jsonl", "bookmarks.json", "tokens/step-000002.rank-0.parquet",
         "scores/last/scores.json", "scores/last/step-000002.rank-0.parquet"]
DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[:len(data) // 2],
    "holes": lambda data: data[:len(data) // 3] + b"\0" * (len(data) // 3) + data[2 * (len(data) // 3):],
    "foreign": lambda data: b"%PDF-1.7\n\xff\xfe\x00binary\n" * 20,
    "other json": lambda data: b'[1, "x", {"id": 7}]\n{"step": "x"}\nnull\n',
    "deep": lambda data: b"[" * 200_000,
    "newer": lambda data: data.replace(b'"schema_version": 1', b'"schema_version": 9').replace(b'"step"', b'"moment"').replace(b"PAR1", b"PAR9"),
    "wrong types": lambda data: data.replace(b'"running"', b"3").replace(b'"finished"', b"[]").replace(b'": 1', b'": "1"').replace(b'": 2', b'": {}'),
}


def look(run):
    "Everything that the pages read, what it gave or the sentence with which it refused."
    def tried(f):
        try:
            return f()
        except RunError as e:
            assert "\n" not in str(e) and str(e).endswith(".") and len(str(e)) > 20
            return e
    looks = {"meta": run.meta, "status": run.status, "index": run.index, "steps": run.steps, "metrics": run.metrics, "scores": run.scores,
             "alarms": lambda: read_alarms(run.path), "bookmarks": lambda: read_bookmarks(run.path), "overview": lambda: overview(run)}
    looks |= {f"tokens {s}": lambda s=s: run.trajectory(trace_id(s, 0, 3)) for s in (1, 2, 3)}
    looks |= {f"scored {s}": lambda s=s: run.scored("last", trace_id(s, 0, 3)) for s in (1, 2, 3)}
    return {name: tried(f) for name, f in looks.items()}


UNTOUCHED = {   # what must still be read whatever happens to a file
    "meta.json": ["index", "steps", "metrics", "tokens 1", "tokens 2", "scored 1", "alarms", "bookmarks"],
    "index.jsonl": ["meta", "status", "steps", "metrics", "scores", "alarms"], "metrics.jsonl": ["index", "steps", "tokens 1", "tokens 2", "scored 1"],
    "steps.jsonl": ["index", "metrics", "tokens 1", "scored 1"], "alarms.jsonl": ["index", "tokens 2"], "bookmarks.json": ["index", "tokens 2"],
    "tokens/step-000002.rank-0.parquet": ["index", "steps", "metrics", "tokens 1", "tokens 3", "scored 2"], "scores/last/scores.json": ["index", "tokens 2", "scored 1"],
    "scores/last/step-000002.rank-0.parquet": ["index", "tokens 2", "scored 1", "scored 3"]}


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    "A whole run folder, and all that is read of it."
    folder = tmp_path_factory.mktemp("undamaged") / "run"
    full_run(folder)
    return folder, look(open_run(folder))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_a_sentence_and_the_rest_is_there(undamaged, tmp_path, file, damage):
    folder, before = undamaged
    shutil.copytree(folder, tmp_path / "run")
    kept = open_run(tmp_path / "run")
    kept.index()
    target = tmp_path / "run" / file
    data = DAMAGE[damage](target.read_bytes())
    target.unlink()
    target.write_bytes(data)
    try:
        fresh = open_run(tmp_path / "run")
    except RunError as e:
        assert file == "meta.json" and str(e).endswith(".")
        fresh = None
    for run in filter(None, (kept, fresh)):                  # one that was open before it happened, and one opened after
        after = look(run)
        for name in UNTOUCHED[file]:
            assert not isinstance(after[name], RunError), (name, after[name])
            if hasattr(before[name], "equals") and name not in ("steps",):
                assert before[name].equals(after[name]), name
        refused = [name for name, x in after.items() if isinstance(x, RunError)]
        lines = run.skipped
        changed = file.endswith("jsonl") or any(n not in UNTOUCHED[file] for n in refused) or damage in ("newer", "wrong types", "holes") or "scores.json" in file
        assert changed or lines, "the damage went unnoticed"


@pytest.mark.parametrize("file", [f for f in FILES if f.endswith("jsonl") and not f.startswith("alarms")])
def test_a_folder_in_place_of_a_file(tmp_path, file):
    full_run(tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    (tmp_path / "run" / file).mkdir()
    name = file.split(".")[0]
    with pytest.raises(RunError, match="cannot be read"):
        getattr(open_run(tmp_path / "run"), name)()
    assert open_run(tmp_path / "run").status() == "finished"


def test_the_lines_of_steps_are_made_up_for_when_they_are_missing(tmp_path):
    make_run(tmp_path / "run", steps=3)
    told = open_run(tmp_path / "run").steps()
    lines = (tmp_path / "run/steps.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/steps.jsonl").unlink()                  # as an older version wrote it
    assert json.loads(open_run(tmp_path / "run").steps().to_json()) == json.loads(told.to_json())
    (tmp_path / "run/steps.jsonl").write_text("".join(lines[:2]))   # it died between index and steps
    RunWriter(tmp_path / "run", {}, resume=True)
    assert json.loads(open_run(tmp_path / "run").steps().to_json()) == json.loads(told.to_json())


def test_the_control_tokens_of_a_step_are_those_of_its_rows(tmp_path):
    writer, control = RunWriter(tmp_path / "run", {"probed_tokens": ["a", "b"]}), []
    rng = np.random.default_rng(0)
    for step in (1, 2):
        rows = []
        for i in range(6):
            row = make_row(step, i)
            control.append(np.where((row.mask == 1)[:, None], -rng.exponential(2, (len(row.ids), 2)), np.nan))
            rows.append(make_row(step, i, control=control[-1]))
        writer.append_index(writer.write_tokens(step, rows[:4]))
        writer.append_index(writer.write_tokens(step, rows[4:]))   # in pieces
    run = open_run(tmp_path / "run")
    steps, index = run.steps(), run.index()
    assert steps.trajectories.tolist() == [6, 6]
    for row, line, p in zip(map(run.trajectory, index.id), index.itertuples(), map(np.exp, control)):
        np.testing.assert_allclose(line.control_mean, np.nanmean(p, 0), rtol=2e-3)
        for k, (peak, at) in enumerate(line.control_peak):
            assert abs(np.exp(float(row.control[int(at), k])) - peak) < 1e-3 and abs(peak - np.nanmax(p[:, k])) < 2e-3
    for s in (0, 1):
        peaks = [x for k in range(2) for x in [max((line.control_peak[k][0], line.id) for line in index[index.step == s + 1].itertuples())]]
        assert [(top[0][0], top[0][2]) for top in steps.control_peaks[s]] == peaks
        whole_step = np.concatenate([np.exp(c[~np.isnan(c[:, 0])]) for c in control[6 * s:6 * s + 6]])
        np.testing.assert_allclose(steps.control_mean[s], whole_step.mean(0), rtol=3e-3)
