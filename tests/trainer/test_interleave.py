"""Rounds of RL and of supervised training in one run: heads, references, resuming, alarms."""

import json
from functools import cache
from pathlib import Path

import pytest
import rounds
import torch
from forks import ended, forked, side_by_side
from small import small_policy
from transformers import TrainerCallback

from tirlab.all import (CollapseMonitor, DemonstrationSFT, Detectors, ErroneousTrajectories, Hints, Interleave, OnAlarm, Reflections, RejectionSampling, TIRConfig, TIRTrainer, demonstrate,
                        make_tasks, open_run)
from tirlab.collapse.monitor import Alarm
from tirlab.trainer.interleave import cleared
from tirlab.trainer.phases import bare_forward, last_checkpoint
from tirlab.supervision.reflections import rule_writer, short_prompt
from tirlab.envs.tasks import ENVIRONMENTS
from tirlab.core.tiny import tiny_tokenizer

TASKS, TOK = make_tasks("all", n=6), tiny_tokenizer()
HOPELESS = {row["prompt"][0]["content"] for row in list(TASKS)[::2]}


def reward(prompts, completions, **kwargs):
    "Every second rollout succeeds, on every second task."
    return [float(i % 2 and p[0]["content"] not in HOPELESS) for i, p in enumerate(prompts)]


@cache
def fixed(): return demonstrate(TASKS, TOK, ENVIRONMENTS)


def trainer(folder, callbacks=None, rewards=reward, **options):
    args = dict(output_dir=str(folder), run_dir=str(folder / "run"), per_device_train_batch_size=8, num_generations=4, max_completion_length=128, learning_rate=1e-4, temperature=0.5,
                seed=0, save_strategy="no", disable_tqdm=True, report_to="none", probe="off")
    return TIRTrainer(small_policy(), rewards, TIRConfig(**args | options), TASKS, environment_factory=ENVIRONMENTS, callbacks=callbacks)


def log_probabilities(t, model=None):
    "Of the fixed demonstrations, as the trainer's loss would score them."
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(x.prompt_ids + x.completion_ids) for x in fixed()], batch_first=True)
    with torch.no_grad(): return t._get_per_token_logps_and_entropies(model or t.model, ids, torch.ones_like(ids), ids.shape[1] - 1)[0]


@pytest.mark.slow
def test_the_head_of_rl_comes_back_after_ten_phases(tmp_path):
    "Temperature 0.5: an SFTTrainer on the same model would leave a head of temperature 1 behind. With learning rate 0 nothing else may move either."
    t = trainer(tmp_path, learning_rate=0.0, num_iterations=1)
    before = log_probabilities(t)
    phases = Interleave([1] * 11, [DemonstrationSFT(2)], sft=dict(learning_rate=0.0, num_train_epochs=1)).train(t)
    assert sum(p["kind"] == "sft" for p in phases) == 10 and all(p["losses"][0] > 0 for p in phases if p["kind"] == "sft")
    assert torch.equal(log_probabilities(t), before)
    with bare_forward(t.model): pass
    assert torch.equal(log_probabilities(t), before)


def test_supervised_training_changes_the_policy_and_kl_is_zero_right_after_a_reset(tmp_path):
    t = trainer(tmp_path, beta=0.1)
    before = log_probabilities(t)
    Interleave([0, 1], [DemonstrationSFT(4)], sft=dict(learning_rate=1e-2, per_device_train_batch_size=2)).train(t)
    first = next(m for m in t.state.log_history if "kl" in m)
    assert first["kl"] == 0.0 and not torch.allclose(log_probabilities(t), before, atol=0.1)


def test_a_reference_that_is_kept_stays_where_it_was(tmp_path):
    t = trainer(tmp_path, beta=0.1)
    before = log_probabilities(t, t.ref_model)
    Interleave([0, 1], [DemonstrationSFT(4)], sft=dict(learning_rate=1e-2, per_device_train_batch_size=2), reference="kept").train(t)
    assert torch.equal(log_probabilities(t, t.ref_model), before) and next(m for m in t.state.log_history if "kl" in m)["kl"] > 1e-6


@pytest.mark.parametrize("optimizer", ["fresh", "kept"])
def test_moments_begin_anew_or_go_on(tmp_path, optimizer):
    t, seen = trainer(tmp_path), []
    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs): seen.append(len(t.optimizer.state))
    t.add_callback(Look())
    Interleave([1, 1], [DemonstrationSFT(2)], optimizer=optimizer).train(t)
    assert seen[0] == 0 and (seen[1] == 0) == (optimizer == "fresh")


def test_later_rounds_draw_other_prompts_and_one_folder_holds_all(tmp_path):
    t = trainer(tmp_path)
    phases = Interleave([2, 2], [RejectionSampling(per_task=2), ErroneousTrajectories()]).train(t)
    run = open_run(tmp_path / "run")
    index = run.index()
    rl = index[index.phase == "rl"]
    assert sorted(set(rl.step)) == [1, 2, 3, 4] and run.status() == "finished" and not (tmp_path / "run-2").exists()
    asked = [rl[rl.step == s].task.tolist() for s in range(1, 5)]
    assert asked[:2] != asked[2:]
    taught = index[index.phase == "sft"]
    assert len(taught) == phases[1]["rows"] > 0 and set(taught.step) == {2}
    metrics = run.metrics()
    assert metrics[metrics.split == "sft"]["sft/rows"].tolist() == [phases[1]["rows"]] and metrics[metrics.split == "train"].step.tolist() == [1, 2, 3, 4]
    assert t.args.output_dir == str(tmp_path)
    row = run.trajectory(taught.id.iloc[-1])
    assert row.phase == "sft" and row.mask.any() and torch.tensor(row.logprob).isnan().all()


def test_what_was_taught_is_on_record_token_for_token(tmp_path):
    t = trainer(tmp_path)
    Interleave([1, 1], [Reflections(rule_writer, ErroneousTrajectories("any"), prompt=short_prompt)]).train(t)
    import pyarrow.parquet as pq
    taught, run = pq.read_table(tmp_path / "phase-01-sft" / "lessons.parquet").to_pylist(), open_run(tmp_path / "run")
    rows = [run.trajectory(i) for i in run.index().query("phase == 'sft'").id]
    assert [r["input_ids"] for r in taught] == [list(r.prompt_ids) + r.ids.tolist() for r in rows] and {r.origin for r in rows} == {"reflection", "demonstration"}
    assert [[i != -100 for i in r["labels"]] for r in taught] == [[False] * len(r.prompt_ids) + (r.mask == 1).tolist() for r in rows]


def test_a_round_without_failures_is_skipped_and_says_so(tmp_path, capsys):
    t = trainer(tmp_path)
    phases = Interleave([1, 1], [ErroneousTrajectories(threshold=-1.0)]).train(t)
    assert [p["kind"] for p in phases] == ["rl", "sft", "rl"] and phases[1]["steps"] == phases[1]["rows"] == 0
    assert "nothing to learn from" in capsys.readouterr().out


# resuming

def weights(folder):
    return torch.load(folder / "phase-04-rl" / "weights.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_script(folder) == 0
    return folder


def run_script(folder, *where):
    "How a process that runs rounds.py ended."
    return ended(forked(rounds.main, str(folder), *where, said=f"{folder}.said"))


@pytest.mark.parametrize("where,phases", [("rl", 2), ("sft", 3), ("between", 1), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("start", 0), ("rl-end", 2), ("sft-end", 1)))])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path, whole, where, phases):
    "SIGKILL in the first round, in a later one, in supervised training, at the last step of either, between the two: the same weights, lessons and tasks as without, bit for bit."
    assert run_script(tmp_path, where) == -9
    done = tmp_path / "phases.json"
    assert (len(json.loads(done.read_text())) if done.exists() else 0) == phases
    assert run_script(tmp_path) == 0, Path(f"{tmp_path}.said").read_text()[-3000:]
    a, b = weights(tmp_path), weights(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    plain = lambda folder: [{k: v for k, v in p.items() if k != "seconds"} for p in json.loads((folder / "phases.json").read_text())]
    assert plain(tmp_path) == plain(whole)
    ours, theirs = (open_run(f / "run").index().sort_values("id") for f in (tmp_path, whole))
    assert ours.id.tolist() == theirs.id.tolist() and ours.task.tolist() == theirs.task.tolist() and ours.tokens.tolist() == theirs.tokens.tolist()


def test_a_finished_run_is_not_trained_again(whole):
    before = (whole / "phases.json").read_text()
    assert run_script(whole) == 0 and (whole / "phases.json").read_text() == before


def test_two_processes_go_through_the_same_phases(tmp_path):
    said = tmp_path / "said"
    assert side_by_side(2, rounds.main, str(tmp_path), said=said) == [0, 0], "".join(Path(f"{said}-{rank}").read_text()[-3000:] for rank in (0, 1))
    phases, index = json.loads((tmp_path / "phases.json").read_text()), open_run(tmp_path / "run").index()
    assert [p["kind"] for p in phases] == ["rl", "sft", "rl", "sft", "rl"] and all(p["steps"] and p["losses"] for p in phases if p["kind"] == "sft")
    assert {*index[index.phase == "rl"]["rank"]} == {0, 1} and len(index[index.phase == "sft"]) == sum(p.get("rows", 0) for p in phases)


# alarms

def falling(completions, trainer_state, **kwargs):
    "Half of the rollouts succeed in the first three steps of a round, then none."
    return [float(i % 2 and trainer_state.global_step < 3) for i in range(len(completions))]


def alarmed(folder, **options):
    "A trainer whose reward falls, and a monitor that raises an alarm whenever it moves at all."
    monitor = CollapseMonitor(Detectors({"reward": "both"}, warmup=2, limit=0.5, slack=0.0), action="stop")
    return trainer(folder, [monitor], falling, **options), monitor


@pytest.mark.filterwarnings("ignore:Collapse alarm")
def test_supervision_comes_with_the_alarm_and_rl_goes_on(tmp_path):
    t, monitor = alarmed(tmp_path, learning_rate=1e-3)
    plan = Interleave(OnAlarm(steps=8, portion=2, most=4, check=4), [ErroneousTrajectories("any")], sft=dict(learning_rate=1e-3, per_device_train_batch_size=2))
    phases = plan.train(t)
    assert phases[0]["kind"] == "rl" and phases[0]["reached"] < 8 and phases[0]["alarms"] and phases[1]["kind"] == "sft" and phases[1]["steps"] in (2, 4)
    assert phases[-1]["reached"] == 8 and [p["start"] for p in phases[1:]] == [p["reached"] for p in phases[:-1]]
    alarms = [json.loads(line) for line in (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()]
    assert [a["step"] for a in alarms] == [a["step"] for p in phases if p["kind"] == "rl" for a in p["alarms"]] and phases[0]["alarms"][-1]["step"] == phases[0]["reached"]
    run = open_run(tmp_path / "run")
    assert sorted(set(run.index().query("split == 'train'").step)) == list(range(1, 9))


def test_without_an_alarm_there_is_no_supervision(tmp_path):
    t = trainer(tmp_path, [CollapseMonitor(action="stop")])
    phases = Interleave(OnAlarm(steps=3), [ErroneousTrajectories()]).train(t)
    assert [p["kind"] for p in phases] == ["rl"] and phases[0]["reached"] == 3


class Stop(TrainerCallback):
    "Ends the process, as far as files can tell, right after the checkpoint of a step of the first round."
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == "phase-00-rl" and state.global_step == self.step: raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Collapse alarm")
def test_alarms_come_when_they_would_have_come(tmp_path):
    "Stopped a step before the first alarm, and between the alarm and the end of its round: the same alarms, phases and weights as without."
    plan = Interleave(OnAlarm(steps=8, portion=1, most=2, check=2), [ErroneousTrajectories("any")], sft=dict(learning_rate=1e-3, per_device_train_batch_size=2))
    new = lambda name: alarmed(tmp_path / name, learning_rate=1e-3, save_strategy="steps", save_steps=1)[0]
    plain = lambda name: [{k: v for k, v in p.items() if k != "seconds"} for p in json.loads((tmp_path / name / "phases.json").read_text())]
    told = lambda name: [json.loads(line) | {"time": 0} for line in (tmp_path / name / "run" / "alarms.jsonl").read_text().splitlines()]
    phases = plan.train(new("whole"))
    for name, step in (("before", phases[0]["reached"] - 1), ("at", phases[0]["reached"])):
        t = new(name)
        t.add_callback(Stop(step))
        with pytest.raises(KeyboardInterrupt): plan.train(t)
        plan.train(new(name), resume=True)
        assert plain(name) == plain("whole") and told(name) == told("whole")
        a, b = (torch.load(tmp_path / n / phases[-1]["folder"] / "weights.pt", weights_only=True) for n in (name, "whole"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_half_a_checkpoint_is_none(tmp_path):
    t = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=2, replay_successes=2)
    t.train()
    found = lambda: last_checkpoint(tmp_path, t)
    assert found() == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "prompts.json").unlink()
    assert found() == str(tmp_path / "checkpoint-1") and last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"glo')
    assert found() is None


@pytest.mark.filterwarnings("ignore:Collapse alarm")
def test_what_the_alarm_points_at_is_what_is_taught(tmp_path):
    t, monitor = alarmed(tmp_path)
    index = {}
    def point(alarm):   # as the watch would, at the first rollout of the step
        run = open_run(tmp_path / "run").index()
        index[alarm.step] = run[run.step == alarm.step].iloc[0]
        alarm.culprits.append({"id": index[alarm.step].id, "position": 0, "value": 1.0})
    monitor.listeners.append(point)
    plan = Interleave(OnAlarm(steps=6, portion=1, most=1, check=2), [DemonstrationSFT()])
    phases = plan.train(t)
    taught = open_run(tmp_path / "run").index().query("phase == 'sft'")
    first = phases[0]["alarms"][0]
    assert first["culprits"] and taught[taught.step == first["step"]].prompt.tolist() == [index[first["step"]].prompt]


def test_cleared_is_half_way_back():
    alarm = Alarm(5, "reward", value=0.2, usual=0.8, score=1.0)
    assert [cleared(alarm, {"eval_reward": x}) for x in (0.2, 0.45, 0.55, 0.9)] == [False, False, True, True]
    assert cleared(alarm, {}) is None and cleared(alarm, {"eval_reward": float("nan")}) is None


# what cannot work

@pytest.mark.parametrize("make,said", [
    (lambda: Interleave([], [DemonstrationSFT()]), "no step of RL"),
    (lambda: Interleave([1, -1], [DemonstrationSFT()]), "no step of RL"),
    (lambda: Interleave([1, 1], []), "no signals"),
    (lambda: Interleave([1, 1], [Hints()]), "TIRTrainer's `supervision`"),
    (lambda: Interleave([1, 1], [DemonstrationSFT()], optimizer="new"), "'fresh' or 'kept'"),
    (lambda: Interleave([1, 1], [DemonstrationSFT()], sft=dict(lr=1.0)), "SFTConfig does not know"),
    (lambda: ErroneousTrajectories("some"), "choose 'all' or 'any'"),
])
def test_plans_that_cannot_work(make, said):
    with pytest.raises(ValueError, match=said): make()


def test_what_a_trainer_must_have(tmp_path):
    with pytest.raises(ValueError, match="leave trace=True"): Interleave([1, 1], [DemonstrationSFT()]).train(trainer(tmp_path / "a", trace=False))
    with pytest.raises(ValueError, match="action='stop'"): Interleave(OnAlarm(3), [DemonstrationSFT()]).train(trainer(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "phases.json").write_text("[]")
    (tmp_path / "d" / "phase-00-rl").mkdir(parents=True)
    for name in ("c", "d"):
        with pytest.raises(ValueError, match="already holds an interleaved run"): Interleave([1, 1], [DemonstrationSFT()]).train(trainer(tmp_path / name))
    with pytest.raises(ValueError, match="give its run folder"): Interleave([1, 1], [DemonstrationSFT()]).train(trainer(tmp_path / "d", run_dir=None), resume=True)


def test_what_else_a_trainer_must_have(tmp_path):
    monitor = CollapseMonitor(action="stop")
    with pytest.raises(ValueError, match="whole groups of 4"): Interleave(OnAlarm(3), [DemonstrationSFT()]).train(trainer(tmp_path / "a", [monitor], per_device_eval_batch_size=6))
    with pytest.raises(ValueError, match="set the template"): Interleave([1, 1], [DemonstrationSFT()]).train(trainer(tmp_path / "b", answer_pattern=r"\\boxed"))


def test_a_round_that_taught_nothing_leaves_the_reference_and_so_does_going_on(tmp_path):
    "Supervision that found nothing resets no reference; a process that goes on later finds the one that was there."
    plan = Interleave([1, 1, 1], [ErroneousTrajectories(threshold=-1.0)])
    t = trainer(tmp_path, beta=0.1, learning_rate=1e-2)
    before = log_probabilities(t, t.ref_model)
    plan.train(t)
    assert torch.equal(log_probabilities(t, t.ref_model), before) and (t.step_offset, t.total_steps) == (0, None)
    phases = json.loads((tmp_path / "phases.json").read_text())
    (tmp_path / "phases.json").write_text(json.dumps(phases[:-1]))
    import shutil
    shutil.rmtree(tmp_path / phases[-1]["folder"])
    again = trainer(tmp_path, beta=0.1, learning_rate=1e-2)
    plan.train(again, resume=True)
    assert torch.equal(log_probabilities(again, again.ref_model), before) and torch.equal(log_probabilities(again), log_probabilities(t))


def test_tables_of_completions_and_successes_without_rewards(tmp_path):
    "TRL makes the folder of its tables once; a rollout without a reward is no success."
    t = trainer(tmp_path, log_completions=True)
    Interleave([1, 1], [DemonstrationSFT(1)]).train(t)
    assert list((tmp_path / "phase-02-rl" / "completions").iterdir())
    around = type("A", (), {"recent_tasks": lambda self, window: [type("M", (), dict(ids=["b", "a", "c"], rewards=[float("nan"), 1.0, 0.0]))()], "run": type("R", (), {"trajectory": lambda self, i: i})()})()
    import tirlab.supervision.lessons
    kept, tirlab.supervision.lessons.as_trajectory = tirlab.supervision.lessons.as_trajectory, lambda row: row
    try: assert RejectionSampling().lessons(around) == (["a"], {"successes": 1})
    finally: tirlab.supervision.lessons.as_trajectory = kept


def test_an_order_of_data_is_found_again_in_a_later_epoch(tmp_path):
    t = trainer(tmp_path)
    order = lambda sampler, epoch: (sampler.set_epoch(epoch), list(iter(sampler)))[1]
    whole = t._get_train_sampler()
    first, second = list(iter(whole)), list(iter(whole))
    assert first != second and order(t._get_train_sampler(), 1) == second and order(t._get_train_sampler(), 0) == first
    t.step_offset = 3
    assert list(iter(t._get_train_sampler())) != first
