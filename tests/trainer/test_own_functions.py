"""Estimators, filters, call formats, prompt samplers and turn rewards of the user's own, through the real trainer."""

import copy
import json
import pickle
import sys
from functools import partial

import pytest
import torch
import two_functions
from forks import ended, forked, side_by_side
from test_learning import GROUP, batch_and_gradient, trainer
from transformers import HfArgumentParser

from tirlab.algorithms.advantages import ESTIMATORS, gtpo, tells_turns_apart
from tirlab.algorithms.filters import FILTERS
from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, open_run, tiny_policy
from tirlab.core.formats import TextFormat
from tirlab.core.settings import SettingError

SMALL = dict(per_device_train_batch_size=8, num_generations=8, max_completion_length=64, max_steps=1, save_strategy="no", disable_tqdm=True, report_to="none")


def alone(rewards, group_size, *, batch): return rewards.nansum(1) - batch.outcomes.nan_to_num().mean()
def turnwise(rewards, group_size, *, batch): return rewards - rewards.nanmean()
def keeps(trajectories, mask, *, batch): return mask.bool() | True, [None] * len(mask)
def drops(trajectories, mask): return torch.zeros_like(mask, dtype=torch.bool), [None] * len(mask)
def calls_cost(trajectory, row): return [-0.25 * len(t.calls) for t in trajectory.turns]
def arrows(tokenizer, tools): return TextFormat(tokenizer, tools, syntax="list")


class First:
    "Takes the rows in order."
    def __init__(self, dataset, args): self.size, self.at, self.told = len(dataset), 0, []
    def choose(self, count):
        self.at += count
        return [i % self.size for i in range(self.at - count, self.at)]
    def update(self, rows, successes, tries): self.told.append((rows, successes, tries))
    def state_dict(self): return {"at": self.at}
    def load_state_dict(self, state): self.at = state["at"]


# ---- names and functions


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_function_of_a_name_gives_the_same_advantages(name, tmp_path, monkeypatch):
    found = []
    for kind, advantage in (("name", name), ("function", ESTIMATORS[name])):
        t = trainer(tmp_path / kind, monkeypatch, advantage=advantage, void_in_baseline=False, void_filter="trajectory", format_penalty=0.0, trace=False)
        inputs, loss, _ = batch_and_gradient(t)
        found.append((inputs["advantages"], loss))
    assert found[0][0].shape == found[1][0].shape and torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("name", [n for n in FILTERS if n not in ("high_ratio", "low_prob")])
def test_the_function_of_a_filter_masks_the_same(name, tmp_path, monkeypatch):
    masks = []
    for kind, void_filter in (("name", name), ("function", FILTERS[name])):
        inputs, *_ = batch_and_gradient(trainer(tmp_path / kind, monkeypatch, void_filter=void_filter, trace=False))
        masks.append((inputs["tool_mask"], inputs["num_items_in_batch"]))
    assert torch.equal(masks[0][0], masks[1][0]) and masks[0][1] == masks[1][1]


def test_what_an_estimator_and_a_filter_are_told(tmp_path, monkeypatch):
    told = {}
    def estimator(rewards, group_size, *, batch, gamma):
        told["estimator"] = (rewards, group_size, batch, gamma)
        return torch.zeros(len(rewards))
    def mask(trajectories, mask, *, batch):
        told["filter"] = (trajectories, mask, batch)
        return keeps(trajectories, mask, batch=batch)
    t = trainer(tmp_path, monkeypatch, advantage=estimator, void_filter=mask, gamma=0.5, format_penalty=0.3, trace=False)
    inputs, *_ = batch_and_gradient(t)
    rewards, size, facts, gamma = told["estimator"]
    assert (size, gamma, len(rewards)) == (GROUP, 0.5, 8) and facts.outcomes.tolist() == [1.0, 0.0, 0.0, 1.0] * 2 and facts.logps is None
    assert [x.completion_ids for x in facts.trajectories] == [x.completion_ids for x in t.batch.trajectories] and [r["answer"] for r in facts.rows] == [r["answer"] for r in t.batch.rows]
    assert rewards[1, 0] == 0 and rewards[2, 0] == pytest.approx(-0.3), "a function gets turn rewards with the format penalty"
    assert told["filter"][0] is told["filter"][2].trajectories and told["filter"][1].shape == inputs["completion_mask"].shape
    assert inputs["advantages"].eq(0).all() and inputs["advantages"].shape == (8,)


def test_log_probabilities_of_the_sampler(tmp_path):
    told = []
    def estimator(rewards, group_size, *, batch): told.append(batch); return turnwise(rewards, group_size, batch=batch)
    t = TIRTrainer(tiny_policy(), answer_reward, TIRConfig(output_dir=str(tmp_path), advantage=estimator, trace=False, **SMALL), make_tasks("arithmetic", n=2), environment_factory=PythonEnvironment)
    t.train()
    for x, logps in zip(told[0].trajectories, told[0].logps):
        wrote = torch.tensor(x.mask).bool()
        assert torch.allclose(logps[:len(wrote)][wrote], torch.tensor(x.logprobs)[wrote], atol=1e-6) and logps[:len(wrote)][~wrote].isnan().all() and logps[len(wrote):].isnan().all()


@pytest.mark.parametrize("options", [dict(loss_type="vespo"), dict(off_policy_mask_threshold=0.5)])
def test_an_option_without_a_meaning_is_refused_when_the_shape_is_known(options, tmp_path, monkeypatch):
    with pytest.raises(SettingError) as error: batch_and_gradient(trainer(tmp_path / "a", monkeypatch, advantage=turnwise, trace=False, **options))
    assert error.value.field == next(iter(options)) and "turnwise" in str(error.value)
    batch_and_gradient(trainer(tmp_path / "b", monkeypatch, advantage=alone, trace=False, **options))


@pytest.mark.parametrize("wrong, field", [
    (dict(advantage=lambda rewards, group_size: rewards[:, :1]), "advantage"), (dict(advantage=lambda rewards, group_size: rewards.sum(1) / 0), "advantage"),
    (dict(advantage=lambda rewards, group_size: None), "advantage"), (dict(void_filter=lambda trajectories, mask: mask), "void_filter"),
    (dict(void_filter=lambda trajectories, mask: (mask[:, :1], [None] * len(mask))), "void_filter"),
])
def test_a_wrong_result_stops_before_the_first_step(wrong, field, tmp_path, monkeypatch):
    t = trainer(tmp_path, monkeypatch, trace=False, **wrong)
    before = [p.detach().clone() for p in t.model.parameters()]
    with pytest.raises(SettingError) as error: t.train()
    assert error.value.field == field and "\n" not in str(error.value) and all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))


@pytest.mark.parametrize("options, field", [
    (dict(advantage=lambda rewards: rewards), "advantage"), (dict(advantage=lambda a, b, c: a), "advantage"), (dict(advantage=3), "advantage"), (dict(advantage="nowhere.py:f"), "advantage"),
    (dict(void_filter=lambda mask: mask), "void_filter"), (dict(call_format=lambda tokenizer: tokenizer), "call_format"), (dict(prompt_sampling=lambda: None), "prompt_sampling"),
    (dict(void_filter="os:sep"), "void_filter"), (dict(void_filter="json:loads,dumps"), "void_filter"),
])
def test_a_function_that_cannot_be_called_is_refused_with_the_configuration(options, field):
    with pytest.raises(SettingError) as error: TIRConfig(**options)
    assert error.value.field == field and "\n" not in str(error.value)


def test_a_filter_that_masks_everything_is_named(tmp_path):
    args = TIRConfig(output_dir=str(tmp_path), void_filter=drops, trace=False, **SMALL | dict(max_steps=3))
    t = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("arithmetic", n=3), environment_factory=PythonEnvironment)
    with pytest.warns(UserWarning, match="None of the 3 steps changed the policy: 24 of 24 rollouts dropped: drops"): t.train()


# ---- calls and prompts


def test_a_call_format_of_ones_own_is_the_same_by_name(tmp_path):
    ids = []
    for kind, call_format in (("name", "list"), ("function", arrows)):
        args = TIRConfig(output_dir=str(tmp_path / kind), run_dir=str(tmp_path / kind / "run"), call_format=call_format, **SMALL)
        t = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("arithmetic", n=2), environment_factory=PythonEnvironment)
        t.train()
        ids.append([x.prompt_ids + x.completion_ids for x in t.batches["train"].trajectories])
        assert any(x.calls for x in t.batches["train"].trajectories)
    assert ids[0] == ids[1] and open_run(tmp_path / "function" / "run").meta()["config"]["call_format"] == "test_own_functions:arrows"


def test_a_call_format_that_makes_none(tmp_path):
    with pytest.raises(SettingError) as error:
        TIRTrainer(tiny_policy(), answer_reward, TIRConfig(output_dir=str(tmp_path), call_format=lambda tokenizer, tools: tokenizer, trace=False, **SMALL), make_tasks("arithmetic", n=2),
                   environment_factory=PythonEnvironment)
    assert error.value.field == "call_format"


def test_prompts_are_chosen_and_the_choice_is_told_and_saved(tmp_path):
    args = TIRConfig(output_dir=str(tmp_path), prompt_sampling=First, success_reward=0.5, trace=False, **SMALL | dict(max_steps=2, save_strategy="steps", save_steps=2, per_device_train_batch_size=16))
    tasks = make_tasks("arithmetic", n=3)
    t = TIRTrainer(tiny_policy(), answer_reward, args, tasks, environment_factory=PythonEnvironment)
    t.train()
    assert [rows for rows, *_ in t.builder.sampler.told] == [[0, 1], [2, 0]] and all(tries == [8, 8] for *_, tries in t.builder.sampler.told)
    saved = json.loads((tmp_path / "checkpoint-2" / "prompts.json").read_text())
    assert saved["more"] == {"at": 4, "kind": "First"} and [b["answer"] for b in t.batch.rows[::8]] == [tasks[2]["answer"], tasks[0]["answer"]]


@pytest.mark.parametrize("chosen, words", [([0], "chose 1 rows"), ([0, 9], "row 9"), ([0, -1], "row -1"), ([0, 0.5], "row 0.5"), (None, "NoneType"), ("ab", "str")])
def test_a_choice_that_is_none(chosen, words, tmp_path):
    class Wrong:
        def choose(self, count): return chosen
    args = TIRConfig(output_dir=str(tmp_path), prompt_sampling=lambda dataset, args: Wrong(), trace=False, **SMALL | dict(per_device_train_batch_size=16))
    t = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("arithmetic", n=3), environment_factory=PythonEnvironment)
    with pytest.raises(SettingError, match=words) as error: t.train()
    assert error.value.field == "prompt_sampling"


def test_a_prompt_sampler_that_cannot_choose(tmp_path):
    with pytest.raises(SettingError) as error:
        TIRTrainer(tiny_policy(), answer_reward, TIRConfig(output_dir=str(tmp_path), prompt_sampling=lambda dataset, args: 3, trace=False, **SMALL), make_tasks("arithmetic", n=2),
                   environment_factory=PythonEnvironment)
    assert error.value.field == "prompt_sampling" and "choose" in str(error.value)


# ---- on record


def test_functions_on_record(tmp_path):
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), advantage=turnwise, void_filter=keeps, prompt_sampling=First, call_format=arrows, **SMALL | dict(save_strategy="steps", save_steps=1))
    t = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("arithmetic", n=2), environment_factory=PythonEnvironment)
    t.train()
    names = {"advantage": "test_own_functions:turnwise", "void_filter": "test_own_functions:keeps", "prompt_sampling": "test_own_functions:First", "call_format": "test_own_functions:arrows"}
    config = open_run(tmp_path / "run").meta()["config"]
    loaded = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    for name, text in names.items():
        assert config[name] == json.loads(args.to_json_string())[name] == args.to_sanitized_dict()[name] == getattr(loaded, name) == text and callable(getattr(args, name))
    again = TIRTrainer(tiny_policy(), answer_reward, TIRConfig(**{f: getattr(args, f) for f in ("output_dir", "run_dir", *names)}, **SMALL | dict(max_steps=2, save_strategy="no")),
                       make_tasks("arithmetic", n=2), environment_factory=PythonEnvironment)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2 and again.builder.sampler.at == 2


def test_copies_and_pickles():
    for function in (turnwise, lambda rewards, group_size: rewards, partial(gtpo, gamma=0.0)):
        args = TIRConfig(output_dir="out", advantage=function)
        assert copy.copy(args).advantage is function and callable(copy.deepcopy(args).advantage) and isinstance(pickle.loads(pickle.dumps(args)).advantage, str)
        assert copy.deepcopy(args).to_dict() == args.to_dict() and repr(args)


def test_a_function_by_name_and_the_nearest_argument(tmp_path, monkeypatch):
    (tmp_path / "my_own_algo.py").write_text("def mine(rewards, group_size): return rewards\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert TIRConfig(output_dir="out", advantage="my_own_algo.py:mine").advantage.__name__ == "mine"
    assert HfArgumentParser(TIRConfig).parse_args_into_dataclasses(["--advantage", "my_own_algo.py:mine", "--output_dir", "out"])[0].advantage.__module__ == "my_own_algo"
    with pytest.raises(SettingError, match="nearest is advantage") as error: TIRConfig(advantag="gtpo")
    assert (error.value.field, error.value.value) == ("advantag", "gtpo")


# ---- turn rewards


class Counts(PythonEnvironment):
    "Tells what its turns earned."
    def get_turn_rewards(self, trajectory): return [0.5 * bool(t.calls) for t in trajectory.turns]


@pytest.mark.parametrize("advantage", [*ESTIMATORS, turnwise, alone])
def test_turn_rewards_count(advantage, tmp_path, monkeypatch):
    "In the table that the estimator sees, weighed; by rollout, in the sum."
    monkeypatch.setattr(sys.modules["test_learning"], "PythonEnvironment", Counts)
    make = sys.modules["test_learning"].TIRTrainer
    monkeypatch.setattr(sys.modules["test_learning"], "TIRTrainer", partial(make, turn_reward_funcs=[calls_cost]))
    t = trainer(tmp_path, monkeypatch, advantage=advantage, turn_reward_weights=[2.0], format_penalty=0.0, trace=False)
    inputs, *_ = batch_and_gradient(t)
    turns = t.batch.trajectories[1]
    assert turns.turn_scores == {"calls_cost": [-0.25, -0.25, 0.0], "Counts": [0.5, 0.5, 0.0]} and t.batch.turn_rewards[1, :3].tolist() == [0.0, 0.0, 0.0]
    assert t.batch.trajectories[0].turn_scores["calls_cost"] == [-0.25, 0.0] and "get_turn_rewards" not in [tool.__name__ for tool in t.tools]
    want = ESTIMATORS[advantage] if isinstance(advantage, str) else None
    if want and not tells_turns_apart(advantage): assert torch.allclose(inputs["advantages"], want(t.batch.turn_rewards, GROUP), atol=1e-6)


def test_grpo_adds_up_turn_rewards(tmp_path, monkeypatch):
    make = sys.modules["test_learning"].TIRTrainer
    def last(trajectory, row): return [0.0] * (len(trajectory.turns) - 1) + [float(len(trajectory.turns))]
    monkeypatch.setattr(sys.modules["test_learning"], "TIRTrainer", partial(make, turn_reward_funcs=[last]))
    t = trainer(tmp_path, monkeypatch, trace=False)
    inputs, *_ = batch_and_gradient(t)
    total = torch.tensor([r + len(x.turns) for r, x in zip([1.0, 0.0, 0.0, 1.0] * 2, t.batch.trajectories)]).view(2, 4)
    assert torch.allclose(inputs["advantages"], ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).flatten(), atol=1e-5)
    assert t._metrics["train"]["turn_rewards/last"] == [pytest.approx(sum(len(x.turns) for x in t.batch.trajectories) / sum(len(x.turns) for x in t.batch.trajectories))]


def test_turn_rewards_in_the_trace(tmp_path):
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), advantage="gtpo", **SMALL)
    t = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("arithmetic", n=2), environment_factory=Counts, turn_reward_funcs=[calls_cost])
    t.train()
    run = open_run(tmp_path / "run")
    for id in run.index().id:
        row = run.trajectory(id)
        scores = dict(row.turn_scores)
        assert set(scores) == {"calls_cost", "Counts", "format_penalty"} and all(len(v) == len(row.turn_kinds) for v in scores.values())
        assert [sum(v) for v in zip(*scores.values())][:-1] == pytest.approx(row.turn_rewards[:-1])


@pytest.mark.parametrize("result, words", [([], "0 numbers"), ([0.0] * 9, "9 numbers"), (None, "NoneType"), (["a"], "turn")])
def test_a_turn_reward_that_is_none(result, words, tmp_path, monkeypatch):
    class Wrong(PythonEnvironment):
        def get_turn_rewards(self): return result
    monkeypatch.setattr(sys.modules["test_learning"], "PythonEnvironment", Wrong)
    with pytest.raises(ValueError, match=words) as error: batch_and_gradient(trainer(tmp_path, monkeypatch, trace=False))
    assert "'Wrong'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given, options, field", [
    (calls_cost, {}, "turn_reward_funcs"), (["calls_cost"], {}, "turn_reward_funcs"), ([lambda t: []], {}, "turn_reward_funcs"), ([calls_cost], dict(turn_reward_weights=[1.0, 2.0]), "turn_reward_weights"),
    ([calls_cost], dict(multi_objective_aggregation="normalize_then_sum"), "multi_objective_aggregation"),
])
def test_turn_rewards_that_are_refused(given, options, field, tmp_path):
    with pytest.raises(SettingError) as error:
        TIRTrainer(tiny_policy(), answer_reward, TIRConfig(output_dir=str(tmp_path / "out"), trace=False, **SMALL | options), make_tasks("arithmetic", n=2), environment_factory=PythonEnvironment,
                   turn_reward_funcs=given)
    assert error.value.field == field and not (tmp_path / "out").exists()


# ---- several processes


def test_two_processes_tell_an_estimator_what_one_does(tmp_path):
    "Trajectories, rows, outcomes and log-probabilities of all processes reach each of them; a prompt sampler without a seed chooses once."
    said = tmp_path / "said"
    assert ended(forked(two_functions.main, str(tmp_path / "one"), said=said)) == 0, said.read_text()[-3000:]
    assert side_by_side(2, two_functions.main, str(tmp_path / "two"), said=said) == [0, 0], "".join(f.read_text()[-3000:] for f in tmp_path.glob("said-*"))
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("one-0.json", "two-0.json", "two-1.json"))
    assert first == second and first["texts"] == one["texts"] and first["answers"] == one["answers"] and first["outcomes"] == one["outcomes"] and first["turns"] == one["turns"]
    for a, b in zip(one["logps"], first["logps"]): assert a == pytest.approx(b, abs=1e-4)
