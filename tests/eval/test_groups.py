"""Figures over seeds and differences between groups of runs, by hand."""
import math

import pytest

from tirlab.cli import main as cli
from tirlab.eval.groups import compare_groups, compare_sides, group_table, paired, run_figures, spread, t_quantile, two_sides, welch
from tirlab.traces.run import RunWriter


def write(folder, seed, ends, config=None):
    "A run of training whose last step has these figures."
    writer = RunWriter(folder, dict(config=dict(seed=seed) | (config or {})))
    for step in range(20): writer.log(step, {"reward": 0.1 if step < 18 else ends, "entropy": 1.0})
    writer.log(19, {"reward": ends / 2}, "eval")
    writer.close()
    return folder


def test_student_by_hand():
    assert (t_quantile(1), t_quantile(2.9), t_quantile(30)) == (12.706, 4.303, 2.042) and t_quantile(1e9) == pytest.approx(1.96)
    s = spread([1.0, 2.0, 3.0, float("nan")])
    assert (s.mean, s.runs) == (2.0, 3) and s.high == pytest.approx(2 + 4.303 / math.sqrt(3))
    assert spread([5.0]).runs == 1 and math.isnan(spread([5.0]).low) and math.isnan(spread([]).mean)
    mean, low, high = welch([0.0, 2.0], [10.0, 10.0])           # the whole spread is the first group's: one degree of freedom
    assert mean == 9 and high - mean == pytest.approx(12.706) and paired([1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert welch([1.0, 1.0], [2.0, 2.0]) == (1.0, 1.0, 1.0) and math.isnan(welch([1.0], [2.0])[1])


def test_runs_are_paired_by_seed(tmp_path):
    a = [write(tmp_path / f"a/seed-{s}", s, 0.5 + s / 10) for s in (2, 0, 1, 7)]
    b = [write(tmp_path / f"b/seed-{s}", s, 0.6 + s / 10) for s in (0, 1, 2)]
    d = compare_groups(a, b)["reward"]
    assert d.pairs == 3 and d.mean == pytest.approx(0.1) and d.real and d.first == pytest.approx(0.6)
    assert run_figures(a[1]) == dict(reward=pytest.approx(0.5), entropy=1.0) | {"held-out reward": 0.25}
    other = [write(tmp_path / f"c/seed-{s}", s + 10, 0.6 + s / 10) for s in (0, 1, 2)]
    assert compare_groups(a, other)["reward"].pairs == 0 and not compare_groups(a, other)["reward"].real
    twice = [*b, write(tmp_path / "d/again", 0, 0.6)]
    assert compare_groups(a, twice)["reward"].pairs == 0
    alone = compare_groups(a[:1], b[:1])["reward"]
    assert math.isnan(alone.low) and not alone.real and "add seeds" in str(alone)
    assert group_table(b).splitlines()[1].split()[:4] == ["reward", "0.6", "0.7", "0.8"]


def test_compare_from_the_command_line(tmp_path, capsys):
    for s in (0, 1): write(tmp_path / f"a/seed-{s}", s, 0.5), write(tmp_path / f"b/seed-{s}", s, 0.7)
    assert cli.main(["compare", str(tmp_path / "a"), "vs", str(tmp_path / "b"), "--json"]) == 0
    out = capsys.readouterr()
    assert "2 pairs by seed" in out.err and '"real": true' in out.out
    first, second = two_sides([str(tmp_path / "a"), str(tmp_path / "b/seed-1")])
    assert (len(first), len(second)) == (2, 1) and math.isnan(compare_sides(first, second)["reward"]["low"])
