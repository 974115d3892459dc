"""Numbers that are infinite, missing, huge or of another library: each is written, read, shown and exported, and no summary is anything but finite or null."""
import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_app import app
from test_app_tokens import shown as sent
from trace_rows import CONTROL, make_row, make_run

from tirlab.plots.export import export_dataset, export_html
from tirlab.traces.files import as_float, plain
from tirlab.plots.groups import prompts, rollout_html
from tirlab.traces.search import find
from tirlab.traces.terminal import overview, shown
from tirlab.traces.run import RunWriter, TraceRow, open_run, trace_id

NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan, "none": None, "huge": 1e300, "a huge integer": 10**30, "beyond every float": 10**400, "text": "0.5",
           "float32": np.float32(.5), "float64 -inf": np.float64("-inf"), "int64": np.int64(3), "bool": True, "numpy bool": np.bool_(True)}
PLACES = {name: lambda v, n, name=name: {name: v} for name in ("reward", "tool_seconds", "calls", "failed_calls", "scored_at")}
PLACES |= {name: lambda v, n, name=name: {name: [v]} for name in ("turn_rewards", "turn_advantages")} | {"rewards": lambda v, n: {"rewards": {"answer": v, "format": 0.0}}}
PLACES |= {name: lambda v, n, name=name: {name: [v] + [-.1] * (n - 1)} for name in ("logprob", "entropy", "surprise", "sampling_logprob", "advantage")}
PLACES |= {"control": lambda v, n: {"control": [[v] * len(CONTROL)] + [[-1.0] * len(CONTROL)] * (n - 1)}}
COUNTS = ("calls", "failed_calls", "scored_at")
TOKENS = ("logprob", "entropy", "surprise", "sampling_logprob", "advantage", "control")


def strict(path):
    "Lines of a file as a browser reads them, and as pandas does."
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert len(pd.read_json(path, lines=True)) == len(lines)
    return lines


def whole_numbers(x):
    "Every number of a JSON value is finite, for JSON knows no others."
    return all(map(whole_numbers, x.values() if isinstance(x, dict) else x)) if isinstance(x, (dict, list)) else not isinstance(x, float) or math.isfinite(x)


def same(a, b):
    return a == b or a != a and b != b or a is None and b != b or b is None and a != a


def as_stored(place, v):
    "What a row holds of a number."
    if place in COUNTS:
        return float(v) if isinstance(v, (bool, np.bool_, np.int64)) else math.nan
    want = math.nan if v is None else as_float(v)
    with np.errstate(over="ignore"):
        return float(np.dtype({"logprob": "f4", "sampling_logprob": "f4", "advantage": "f4"}.get(place, "f2" if place in TOKENS else "f8")).type(want))


@pytest.mark.parametrize("place", PLACES)
def test_an_odd_number_is_kept_where_it_stands(tmp_path, place):
    numbers = {k: v for k, v in NUMBERS.items() if not (place in TOKENS and k == "beyond every float")}   # NumPy has no such number
    run_dir = tmp_path / "run"
    writer = RunWriter(run_dir, {"control_tokens": CONTROL, "probed_tokens": CONTROL, "config": {"odd": list(numbers.values())}})
    kept = open_run(run_dir)
    for step, v in enumerate(numbers.values(), 1):          # beside a healthy one, and read while it is written
        writer.append_index(writer.write_tokens(step, [make_row(step, 0), make_row(step, 1, **PLACES[place](v, len(make_row(step, 1).ids)))]))
        writer.log(step, {"reward": v, "loss": 0.5})
        if step < 4:
            assert len(kept.index()) == 2 * step
    writer.close()
    run = open_run(run_dir)
    for r in (run, kept):
        assert len(r.index()) == 2 * len(numbers) and r.skipped == 0 and (r.steps().trajectories == 2).all() and r.meta()["status"] == "finished"
    # summaries are finite or null, and every line is strict JSON
    lines, steps = strict(run_dir / "index.jsonl"), strict(run_dir / "steps.jsonl")
    assert all(map(whole_numbers, lines + steps)) and "Infinity" not in (run_dir / "steps.jsonl").read_text()
    assert not any(isinstance(x, str) for line in lines for k, x in line.items() if k.startswith(("mean_", "min_", "control_")))
    strict(run_dir / "metrics.jsonl")
    json.loads((run_dir / "meta.json").read_text(), parse_constant=pytest.fail)
    # the number itself, in its row and in the index
    index, out = run.index().set_index("id"), io.StringIO()
    for step, v in enumerate(numbers.values(), 1):
        row, line, want = run.trajectory(trace_id(step, 0, 1)), index.loc[trace_id(step, 0, 1)], as_stored(place, v)
        got = row.rewards["answer"] if place == "rewards" else getattr(row, place)
        got = got if np.ndim(got) == 0 else got[0] if np.ndim(got) == 1 else got[0][0]
        assert same(got, want), (v, got)
        if place in ("reward", "tool_seconds", "rewards", *COUNTS):
            assert same(line[place]["answer"] if place == "rewards" else line[place], want), v
        Console(file=out, width=200).print(shown(row))
        rollout_html(row, run.trajectory(trace_id(step, 0, 0)))
    # shown and exported
    Console(file=out, width=200).print(overview(run))
    assert all(trace_id(s, 0, 1) in out.getvalue() for s in range(1, len(numbers) + 1))
    assert export_html(run, tmp_path / "page.html", step=2, group=0) == 2
    table = prompts(index.reset_index())
    assert np.isfinite(table["mean"].dropna()).all() and np.isfinite(table["std"].dropna()).all()
    find(index.reset_index(), reward=(0, 1))


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    "Healthy steps, and one in which each rollout has odd numbers of another kind everywhere."
    path = tmp_path_factory.mktemp("odd") / "run"
    writer = make_run(path, steps=2, status="running")
    rows = []
    for i, v in enumerate((math.inf, -math.inf, math.nan, None, 1e300, -1e300)):
        row = make_row(3, i)
        n, end = len(row.ids), np.full(len(row.ids), np.nan if v is None else v)
        rows.append(make_row(3, i, group=0, reward=v, rewards={"answer": v}, tool_seconds=0.0 if v is None else v, turn_rewards=[v] * 3, turn_advantages=[v] * 3, logprob=end, entropy=end, surprise=end,
                             sampling_logprob=np.full(n, -.5), advantage=end, control=np.tile(end[:, None], len(CONTROL)), dropped="void turn 0" if i % 2 else None))
    writer.append_index(writer.write_tokens(3, rows))
    writer.log(3, {"reward": -math.inf, "entropy": math.nan, "grad_norm": math.inf, "completions/mean_length": 1e300})
    writer.close()
    return path


@pytest.mark.parametrize("page", ["overview.py", "steps.py", "trajectories.py", "control.py", "compare.py", "dropped.py"])
def test_every_page_shows_a_run_with_odd_numbers(odd_run, monkeypatch, page):
    test = app(monkeypatch, odd_run, page)
    for chart in test.get("plotly_chart"):
        json.loads(chart.proto.spec, parse_constant=pytest.fail)


@pytest.mark.parametrize("row", range(6))
def test_a_trajectory_of_odd_numbers_is_shown(odd_run, monkeypatch, row):
    test = app(monkeypatch, odd_run, "trajectory.py", id=f"000003-0-{row:03d}")
    json.loads(test.get("bidi_component")[0].proto.mixed.json, parse_constant=pytest.fail)
    facts, table = sent(test)
    assert facts["id"] == f"000003-0-{row:03d}" and len(table) == len(open_run(odd_run).trajectory(facts["id"]).ids)


def test_a_data_set_of_odd_numbers(odd_run, tmp_path):
    from datasets import load_from_disk
    assert export_dataset(open_run(odd_run), tmp_path / "data") == {"train": 22}
    back = load_from_disk(tmp_path / "data")["train"]
    assert [back["reward"][back["id"].index(f"000003-0-{i:03d}")] for i in (0, 1, 3, 4)] == [math.inf, -math.inf, None, 1e300]


@pytest.mark.parametrize("changes", [dict(reward="good"), dict(group=None), dict(iteration=math.nan), dict(group=1e300), dict(turn_rewards=["x"])])
def test_what_is_no_number_is_named(changes):
    with pytest.raises(ValueError, match="trajectory 000001-0-000: .*(give|no number)"):
        make_row(1, 0, **changes)


def test_strict_json_of_any_integer():
    assert json.loads(json.dumps(plain({"a": 10**30, "b": -10**400, "c": 2**63 - 1, "d": True, "e": 0})), parse_constant=pytest.fail) == {"a": 1e30, "b": "-Infinity", "c": 2**63 - 1, "d": True, "e": 0}
    assert TraceRow(id="x", step=np.int64(3), stop="answer").step == 3


def test_a_group_without_variance_may_hold_unscored_rollouts():
    from tirlab.traces.steps import reward_summary
    lines = [dict(reward=r, group=g) for g, rewards in enumerate([[None, 0.9, 0.9], [None, None], [0.1, None, 0.2]]) for r in rewards]
    assert reward_summary(lines)["level_groups"] == 1
