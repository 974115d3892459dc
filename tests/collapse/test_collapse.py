"""Alarms while training: raised at the break and not before, naming the tokens behind them, and acted upon."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, make_tasks, open_run, tiny_policy
from tirlab.collapse.monitor import CollapseMonitor, Cusum, Detectors, find_culprits, robust_z
from tirlab.algorithms.filters import has_answer, void_turns


def series(seed, steps=60, shift=0.0, at=30):
    x = np.random.default_rng(seed).normal(0.5, 0.05, steps)
    x[at:] += shift
    return x


def alarms(values, **options):
    detector = Cusum(**options)
    return [i for i, x in enumerate(values) if detector.update(x) >= 1]


def test_calm_series_hardly_alarm_and_breaks_do():
    calm = sum(bool(alarms(series(seed))) for seed in range(200))
    found = [alarms(series(seed, shift=-0.25)) for seed in range(200)]
    assert calm <= 12 and sum(bool(f) and 30 <= f[0] <= 36 for f in found) >= 180


def test_sides_and_outliers():
    assert not alarms(series(0, shift=0.3), side="down") and alarms(series(0, shift=0.3), side="up") and alarms(series(0, shift=0.3), side="both")
    lone = series(0)
    lone[30] = 5.0
    assert not alarms(lone) and not alarms([float("nan")] * 60)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(-1e6, 1e6), st.floats(-1e3, 1e3))
def test_deviations_do_not_depend_on_the_origin_of_small_numbers(past, value, shift):
    "Finite for any past; zero at the median; and the same for a mirrored series but for the sign."
    z = robust_z(value, past)
    assert np.isfinite(z) and robust_z(float(np.median(past)), past) == 0
    assert robust_z(-value, [-x for x in past]) == pytest.approx(-z, rel=1e-6, abs=1e-9)


# ---- in training


def falling(completions, trainer_state=None, **kwargs):
    "Half of each group succeeds, until it breaks."
    return [float(i % 2 == 0 and trainer_state.global_step < 4) for i in range(len(completions))]


def trained(folder, monitor, **options):
    common = dict(output_dir=str(folder), run_dir=str(folder / "run"), max_steps=8, per_device_train_batch_size=8, num_generations=4, max_completion_length=96, seed=0, learning_rate=1e-5,
                  lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True, report_to="none", probe="on")
    t = TIRTrainer(tiny_policy(), falling, TIRConfig(**common | options), make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment, callbacks=[monitor])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        t.train()
    return t, [str(w.message) for w in said if "Collapse alarm" in str(w.message)]


def watching(**options):
    return CollapseMonitor(Detectors({"reward": "down"}, warmup=3, limit=5.0), **options)


def test_a_break_is_told_written_and_passed_on(tmp_path):
    heard, monitor = [], watching(listeners=[lambda alarm: heard.append(alarm)])
    t, said = trained(tmp_path, monitor, max_completion_length=24)
    assert [a.signal for a in monitor.alarms] == ["reward"] == [a.signal for a in heard] and monitor.alarms[0].step in (5, 6)
    assert len(said) == 1 and "reward is 0, usually 0.5" in said[0] and t.state.global_step == 8
    (line,) = map(json.loads, Path(t.run_dir, "alarms.jsonl").read_text().splitlines())
    assert line["step"] == monitor.alarms[0].step and line["signal"] == "reward" and line["culprits"] == []


def test_a_break_stops_training_and_the_healthy_weights_are_kept(tmp_path):
    monitor = watching(action="stop", keep_every=2)
    t, _ = trained(tmp_path, monitor, trace=False, max_completion_length=24)
    assert t.state.global_step == monitor.alarms[0].step < 8
    kept = AutoModelForCausalLM.from_pretrained(monitor.healthy)
    assert Path(monitor.healthy).name == "healthy" and not list(tmp_path.glob(".healthy*")) and sum(p.numel() for p in kept.parameters()) == sum(p.numel() for p in t.model.parameters())


def test_a_break_lowers_the_learning_rate(tmp_path):
    monitor = watching(action="lower_lr", factor=0.1)
    t, _ = trained(tmp_path, monitor, trace=False, max_completion_length=24)
    rates = {m["step"]: m["learning_rate"] for m in t.state.log_history if "learning_rate" in m}
    broke = monitor.alarms[0].step
    assert rates[broke] == 1e-5 and rates[8] == pytest.approx(1e-6) and t.optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def test_culprits_are_the_tokens_behind_the_number(tmp_path):
    "The first culprit's value is the extreme of the metric, its place is in the record, and the record says the same."
    t, _ = trained(tmp_path, watching(), max_steps=1, temperature=1.0)
    run, logs = open_run(t.run_dir), next(m for m in t.state.log_history if "reward" in m)
    names = run.meta()["probed_tokens"]
    worst = t.watch.culprits("probe/im_end/forbidden_max")
    assert worst[0]["value"] == pytest.approx(logs["probe/im_end/forbidden_max"], rel=1e-5) and [c["value"] for c in worst] == sorted([c["value"] for c in worst], reverse=True)
    row = run.trajectory(worst[0]["id"])
    assert np.exp(row.control[worst[0]["position"], names.index("<|im_end|>")]) == pytest.approx(worst[0]["value"], rel=2e-2)
    least = t.watch.culprits("probe/probability_min")[0]
    assert least["value"] == pytest.approx(logs["probe/probability_min"], rel=1e-5) == pytest.approx(np.exp(run.trajectory(least["id"]).logprob[least["position"]]), rel=1e-4)
    assert t.watch.culprits("probe/logit_gradient/turn_1") and t.watch.culprits("reward") == [] and t.watch.culprits("probe/logit_gradient/turn_99") == []
    silent = t.watch.culprits("probe/call_rate")
    assert all(run.trajectory(c["id"]).turn_kinds for c in silent)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="action='panic' is unknown"): CollapseMonitor(action="panic")


def test_culprits_of_void_turns_follow_the_answer_pattern(tmp_path):
    "A plain answer is void where answers are boxed: the rate counts it, and it is named."
    t, _ = trained(tmp_path / "boxed", watching(), max_steps=1, temperature=1.0, answer_pattern=r"\\boxed")
    rate, found = next(m for m in t.state.log_history if "reward" in m)["probe/void_rate"], t.watch.culprits("probe/void_rate")
    void = {name for name, x in zip(t.watch._last[1], t.watch._last[0]) if any(void_turns(x, has_answer(r"\\boxed")))}
    assert rate > 0 and found and {c["id"] for c in found} <= void and len(found) == min(5, sum(sum(void_turns(x, has_answer(r"\\boxed"))) for x in t.watch._last[0]))
    plain = find_culprits("probe/void_rate", *t.watch._last, t.watch.probe.tokens, t.watch.end)
    assert len(plain) < len(found)
