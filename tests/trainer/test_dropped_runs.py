"""Runs that learn nothing say so: while they go on, at their end, in the record and in the app, with the reason that most rollouts have."""

import warnings

import pytest
from small import halves, small_policy
from test_app import app
from test_trouble import Breaks
from transformers import ProgressCallback

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, make_tasks, open_run, tiny_policy
from tirlab.trainer.recording import without_gradient

SMALL = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=48, learning_rate=1e-4, save_strategy="no", report_to="none", seed=0, probe="off")


def equal(completions, **kwargs): return [0.7] * len(completions)
def none(completions, **kwargs): return [None] * len(completions)
def unbounded(completions, **kwargs): return [float("inf")] * len(completions)


def trained(folder, reward=halves, steps=2, environment=PythonEnvironment, policy=None, **options):
    "A run, and what it warned of; what the record and the bar said after each step."
    args = TIRConfig(output_dir=str(folder), run_dir=str(folder / "run"), max_steps=steps, **SMALL | options)
    t = TIRTrainer(policy or small_policy(), reward, args, make_tasks("arithmetic", n=8), environment_factory=environment)
    t.seen = []
    class Look(ProgressCallback):
        def on_log(self, args, state, control, **kwargs):
            bars = [c.training_bar.desc for c in t.callback_handler.callbacks if getattr(c, "training_bar", None) is not None]
            t.seen.append((t.recorder.writer.meta["warning"] if t.recorder else None, bars[0] if bars else None))
    t.add_callback(Look())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        t.train()
    t.said = [str(w.message) for w in said if issubclass(w.category, UserWarning) and "changed" in str(w.message)]
    return t


EMPTY = {"void turns": (halves, dict(void_filter="trajectory", answer_pattern="never said", answer_template="never said {}"), "8 of 8 rollouts dropped: void turn"),
         "cut off": (halves, dict(mask_truncated_completions=True, max_completion_length=2, environment=None, policy=tiny_policy()), "8 of 8 rollouts dropped: cut off"),
         "zero variance": (equal, dict(), "8 of 8 rollouts without a gradient: zero-variance group"),
         "zero-variance groups dropped": (equal, dict(min_reward_std=1e-3), "8 of 8 rollouts dropped: group zero variance"),
         "by turn": (equal, dict(advantage="gtpo", gamma=1.0, format_penalty=0.0), "8 of 8 rollouts without a gradient: zero-variance group"),
         "unscored": (none, dict(), "8 of 8 rollouts without a gradient: unscored"), "infinite": (unbounded, dict(), "8 of 8 rollouts without a gradient: unscored"),
         "improbable": (halves, dict(void_filter="low_prob", filter_threshold=0.999999), "8 of 8 rollouts dropped: probability below 0.999999"),
         "steps are taken all the same": (equal, dict(skip_empty_steps=False, min_reward_std=1e-3), "8 of 8 rollouts dropped: group zero variance")}


@pytest.mark.parametrize("reward, options, why", EMPTY.values(), ids=EMPTY)
def test_a_run_in_which_no_step_has_a_gradient_ends_with_a_warning(reward, options, why, tmp_path):
    t = trained(tmp_path, reward, **options)
    assert len(t.said) == 1 and t.said[0].startswith("None of the 2 steps changed the policy: ") and why in t.said[0]
    meta = open_run(t.run_dir).meta()
    assert meta["status"] == "finished" and meta["warning"].startswith("None of the 2 steps changed the policy: ") and why in meta["warning"]
    live, bar = t.seen[0]
    assert live == bar and live.startswith("Step 1: 4 of 4 rollouts ") and why.split(": ")[1] in live


def test_what_failed_is_said_by_its_error(tmp_path):
    "The second group is whole and earns the same: one failed, seven are equal."
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), max_steps=1, **SMALL | dict(per_device_train_batch_size=8))
    t = TIRTrainer(small_policy(), equal, args, make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment)
    t.engine = Breaks(t, ("train", 1, 2))
    with pytest.warns(UserWarning, match=r"8 of 8 rollouts without a gradient: zero-variance group \(7\), a hiccup \(1\)"): t.train()


def test_a_healthy_run_is_silent_and_three_empty_steps_in_a_row_are_said_while_they_happen(tmp_path):
    t = trained(tmp_path / "a", steps=3)
    assert t.said == [] and t.seen[0] == (None, "") and open_run(t.run_dir).meta()["warning"] is None
    def late(completions, trainer_state=None, **kwargs): return equal(completions) if 2 <= trainer_state.global_step < 5 else halves(completions)
    t = trained(tmp_path / "b", late, steps=6)
    assert len(t.said) == 1 and t.said[0].startswith("The last 3 steps changed nothing. Step 5: 4 of 4 rollouts without a gradient: zero-variance group. The tasks are too hard")
    assert [bool(live) for live, _ in t.seen[:6]] == [False, False, True, True, True, False] and open_run(t.run_dir).meta()["warning"] is None


def test_parts_of_a_batch_are_judged_by_themselves(tmp_path):
    "Two steps a batch: each of its rollouts is counted once."
    t = trained(tmp_path, equal, steps=2, steps_per_generation=2, gradient_accumulation_steps=1)
    assert "8 of 8 rollouts without a gradient" in t.said[0]


def test_reasons_in_one_line():
    assert without_gradient(["3 tokens with ratio above 2", None]) == "1 of 2 rollouts dropped: ratio above 2"
    assert without_gradient(["cut off"] * 2 + ["void turn 12"] * 3) == "5 of 5 rollouts dropped: void turn (3), cut off (2)"


def test_the_app_shows_why_nothing_was_learnt(tmp_path, monkeypatch):
    t = trained(tmp_path, halves, void_filter="trajectory", answer_pattern="never said", answer_template="never said {}")
    test = app(monkeypatch, t.run_dir)
    assert [w.value.replace("\\", "") for w in test.warning] == ["None of the 2 steps changed the policy: 8 of 8 rollouts dropped: void turn."]
