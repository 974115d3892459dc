"""The run folder under bad conditions: torn lines, crashes, several ranks, readers at work, folders of others."""
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_rows import add_steps, make_row, make_run

from tirlab.traces.rows import read_row, write_parquet
from tirlab.traces.run import INDEX_COLUMNS, RunError, RunWriter, TraceRow, open_run, trace_id


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_torn_last_line_waits_for_its_newline(tmp_path):
    writer = make_run(tmp_path / "run", steps=1, status="running")
    run = open_run(tmp_path / "run")
    whole = len(run.index())
    lines = writer.write_tokens(2, [make_row(2, i) for i in range(3)])
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with open(tmp_path / "run/index.jsonl", "ab") as f:
        f.write(data[:-40])
        f.flush()
        assert len(run.index()) == whole + 2
        f.write(data[-40:])
    assert len(run.index()) == whole + 3
    assert run.skipped == 0
    assert len(run.metrics()) == 1


def test_foreign_and_damaged_lines_are_counted(tmp_path):
    make_run(tmp_path / "run", steps=1)
    with open(tmp_path / "run/index.jsonl", "ab") as f:
        f.write(b'garbage\n[1, 2]\n{"id": 7, "step": "x"}\n\xff\xfe\n')
    with open(tmp_path / "run/metrics.jsonl", "ab") as f:
        f.write(b'null\n')
    run = open_run(tmp_path / "run")
    assert len(run.index()) == 8 and len(run.metrics()) == 1
    assert run.skipped == 5


def test_crash_between_tokens_and_index_hides_the_rows(tmp_path):
    writer = make_run(tmp_path / "run", steps=1, status="running")
    writer.write_tokens(2, [make_row(2)])                    # and here it dies, before append_index
    run = open_run(tmp_path / "run")
    assert set(run.index().step) == {1}
    again = RunWriter(tmp_path / "run", {}, resume=True)
    again.append_index(again.write_tokens(2, [make_row(2, reward=0.25)]))
    assert run.trajectory(trace_id(2, 0, 0)).reward == 0.25   # the new file, not the orphan


def test_a_killed_writer_leaves_a_readable_run_that_can_go_on(tmp_path):
    run_dir = tmp_path / "run"
    code = """
        import itertools, sys
        sys.path.insert(0, sys.argv[2])
        from trace_rows import add_steps, make_run
        writer = make_run(sys.argv[1], steps=1, status="running")
        print("up", flush=True)
        add_steps(writer, itertools.count(2))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), run_dir, os.path.dirname(os.path.dirname(__file__))], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = open_run(run_dir)
    assert run.status() == "running" and run.status(stalled_after=-1) == "stalled"
    index = run.index()
    for name in index.id[::5]:
        assert run.trajectory(name).id == name
    with open(run_dir / "index.jsonl", "ab") as f:            # at worst it died inside a line
        f.write(b'{"id": "half')
    last = int(index.step.max())
    writer = RunWriter(run_dir, {"model": "again"}, resume=True)
    add_steps(writer, [last, last + 1])
    writer.close()
    fresh = open_run(run_dir)
    assert fresh.index().equals(run.index()) and fresh.index().id.is_unique and fresh.skipped == 0
    assert fresh.index().step.max() == last + 1 and fresh.status() == "finished"
    assert not [p for p in run_dir.rglob("*") if p.name.endswith(".tmp")]


def test_two_ranks_write_their_own_files_and_rank_0_the_index(tmp_path):
    ranks = [RunWriter(tmp_path / "run", {}, rank=r) for r in (1, 0)]      # in whatever order they start
    lines = [line for w in ranks for line in w.write_tokens(5, [make_row(5, i, rank=w.rank) for i in range(10)])]
    ranks[1].append_index(json.loads(json.dumps(lines)))                   # they cross processes as plain data
    ranks[0].beat(9, force=True)
    ranks[0].close()
    run = open_run(tmp_path / "run")
    assert sorted(run.index()["rank"].value_counts().items()) == [(0, 10), (1, 10)]
    assert run.trajectory(trace_id(5, 1, 9)).rank == 1
    assert run.status() == "running" and run.meta()["step"] == 0


def test_readers_never_see_anything_torn(tmp_path):
    writer = make_run(tmp_path / "run", steps=1, status="running")
    run, done, troubles = open_run(tmp_path / "run"), threading.Event(), []

    def read():
        seen = 0
        try:
            while not done.is_set():
                fresh = open_run(tmp_path / "run")
                index, other = run.index(), fresh.index()
                assert len(index) >= seen and run.skipped == fresh.skipped == 0
                seen = len(index)
                for frame in (index, other):
                    assert len(run.trajectory(frame.id.iloc[-1]).text) == frame.tokens.iloc[-1]
                run.metrics(), run.status()
        except (AssertionError, RunError, OSError, ValueError) as e:
            troubles.append(e)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for t in threads:
        t.start()
    add_steps(writer, range(2, 25))
    done.set()
    for t in threads:
        t.join()
    assert not troubles
    assert len(run.index()) == 24 * 8


@pytest.mark.parametrize("what", ["foreign", "newer", "other_meta", "run", "file"])
def test_nothing_of_others_is_touched(tmp_path, what):
    place = tmp_path / "place"
    if what == "file":
        place.write_text("mine")
    else:
        place.mkdir()
    if what == "foreign":
        (place / "thesis.tex").write_text("mine")
    if what == "newer":
        (place / "meta.json").write_text('{"format": "tirlab-run", "schema_version": 2}')
    if what == "other_meta":
        (place / "meta.json").write_text('{"schema_version": 1}')
    if what == "run":
        make_run(place, steps=1)
    before = files(tmp_path)
    for resume in (False, True)[:1 if what == "run" else 2]:
        with pytest.raises(RunError) as e:
            RunWriter(place, {}, resume=resume)
        assert "\n" not in str(e.value) and str(e.value).endswith(".") and str(place) in str(e.value)
    assert files(tmp_path) == before


def test_a_failed_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    writer = make_run(tmp_path / "run", steps=1, status="running")
    before = files(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        writer.write_tokens(2, [make_row(2)])
    with pytest.raises(OSError):
        writer.beat(2, force=True)
    assert files(tmp_path) == before
    with pytest.raises(RunError, match="No space left"):
        RunWriter(tmp_path / "fresh", {})
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("make, says", [
    (lambda p: p / "nowhere", "no run folder at"),
    (lambda p: (p / "f").write_text("x") and p / "f", "is a file"),
    (lambda p: p, "is not a run folder"),
    (lambda p: (p / "meta.json").write_text("{") and p, "is not a tirlab run"),
    (lambda p: (p / "meta.json").write_text("[]") and p, "is not a tirlab run"),
    (lambda p: (p / "meta.json").write_text('{"format": "tirlab-run", "schema_version": 9}') and p, "upgrade tirlab"),
])
def test_opening_what_is_no_run(tmp_path, make, says):
    with pytest.raises(RunError, match=says) as e:
        open_run(make(tmp_path))
    assert "\n" not in str(e.value)


def test_a_folder_of_runs_says_which(tmp_path):
    make_run(tmp_path / "monday", steps=1)
    with pytest.raises(RunError, match="did you mean .*monday"):
        open_run(tmp_path)


def test_empty_run(tmp_path):
    RunWriter(tmp_path / "run", {})
    run = open_run(tmp_path / "run")
    assert run.index().empty and list(run.index()) == INDEX_COLUMNS and run.metrics().empty
    assert run.index().reward.dtype == "float64" and math.isnan(run.index().reward.mean())
    with pytest.raises(RunError, match="no trajectory x"):
        run.trajectory("x")


def test_lost_and_damaged_token_files(tmp_path):
    make_run(tmp_path / "run", steps=2)
    run = open_run(tmp_path / "run")
    first, second = sorted((tmp_path / "run/tokens").iterdir())
    first.unlink()
    second.write_bytes(b"PAR1 not")
    with pytest.raises(RunError, match="are gone"):
        run.trajectory(trace_id(1, 0, 0))
    with pytest.raises(RunError, match="cannot be read"):
        run.trajectory(trace_id(2, 0, 0))


def test_an_id_is_used_once(tmp_path):
    writer = RunWriter(tmp_path / "run", {})
    writer.write_tokens(1, [make_row(1, 0)])
    with pytest.raises(ValueError, match="000001-0-000"):
        writer.write_tokens(1, [make_row(1, 0)])
    assert writer.write_tokens(1, [make_row(1, 0, split="eval")], split="eval")[0]["id"] == "eval-000001-0-000"
    assert writer.write_tokens(2, []) == []


def test_beats_are_cheap(tmp_path):
    writer = RunWriter(tmp_path / "run", {"config": {f"option_{i}": i for i in range(200)}})
    start = time.perf_counter()
    for step in range(1000):
        writer.beat(step)
    assert time.perf_counter() - start < 0.5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=20), max_size=30))
def test_any_text_comes_back(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("unicode")
    row = TraceRow(id="x", step=0, ids=range(len(text)), text=text, mask=[1] * len(text), turn=[0] * len(text), prompt_text=text,
                   answer="".join(text).encode("utf-8", "replace").decode(), stop="answer")
    write_parquet(folder / "rows.parquet", [row])
    back = read_row(folder / "rows.parquet", 0)
    clean = [s.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for s in text]
    assert back.text == back.prompt_text == clean and back.answer == row.answer
    writer = RunWriter(folder / "run", {"model": "".join(text)})
    writer.append_index(writer.write_tokens(0, [row]))
    run = open_run(folder / "run")
    assert run.index().id.to_list() == ["x"] and run.skipped == 0 and run.trajectory("x").text == clean


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_any_number_comes_back(tmp_path_factory, numbers):
    folder, n = tmp_path_factory.mktemp("floats"), len(numbers)
    with np.errstate(over="ignore"):
        row = TraceRow(id="x", step=0, ids=[0] * n, text=["a"] * n, mask=[1] * n, turn=[0] * n, logprob=numbers, entropy=numbers,
                       reward=numbers[0], turn_rewards=numbers)
    write_parquet(folder / "rows.parquet", [row])
    back = read_row(folder / "rows.parquet", 0)
    assert back.logprob.tobytes() == row.logprob.tobytes() and back.entropy.tobytes() == row.entropy.tobytes()
    np.testing.assert_array_equal(back.turn_rewards, row.turn_rewards)


def test_metrics_keep_infinity_and_know_nan(tmp_path):
    writer = RunWriter(tmp_path / "run", {})
    writer.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "name": "left out", "step_time": np.float32(0.5)})
    writer.log(1, {"reward": 0.5}, split="eval")
    writer.log(1, {"loss": 0.25})                  # logged again: the later value counts, the others stay
    frame = open_run(tmp_path / "run").metrics().set_index("split")
    assert frame.loc["train", ["loss", "grad_norm", "step_time"]].tolist() == [0.25, math.inf, 0.5]
    assert frame.loc["eval", "reward"] == 0.5 and "name" not in frame
    json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


@pytest.mark.parametrize("row", [0, 7, 8, 19])
def test_only_its_row_group_is_read(tmp_path, row):
    write_parquet(tmp_path / "rows.parquet", [make_row(1, i) for i in range(20)])
    assert read_row(tmp_path / "rows.parquet", row).id == trace_id(1, 0, row)
