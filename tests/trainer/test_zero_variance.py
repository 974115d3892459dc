"""Groups whose rewards cannot be compared, and rewards that are no plain numbers: the same meaning in every estimator, filter and step."""

import warnings

import numpy as np
import pytest
import torch
import tirlab.trainer.trainer
from small import small_policy
from trl import GRPOConfig, GRPOTrainer

from tirlab.algorithms.advantages import BY_TURN, ESTIMATORS, discounted_returns, pooled_advantages, spread_to_tokens
from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, make_tasks, tiny_policy
from tirlab.trainer.batch import total_rewards
from tirlab.trainer.generation import score
from tirlab.algorithms.filters import baseline_rewards, group_verdicts, zero_variance
from tirlab.rewards.shaping import shaped_outcomes

NAN, INF = float("nan"), float("inf")
SMALL = dict(per_device_train_batch_size=8, num_generations=8, max_completion_length=64, max_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, report_to="none", seed=0)
EQUAL = {"one unscored": [0.9] * 7 + [None], "the first unscored": [None] + [0.9] * 7, "half unscored": [None, 0.7] * 4, "one scored": [None] * 7 + [0.3], "nan": [NAN] + [0.9] * 7,
         "none scored": [None] * 8, "one infinite": [0.9] * 7 + [-INF], "one infinite above": [INF] + [0.7] * 7}


def trained(folder, rewards, policy=None, **options):
    "A step on one group that earns these rewards; how far the weights moved."
    def reward(completions, **kwargs): return rewards
    options = dict(run_dir=str(folder / "run"), gamma=1.0, format_penalty=0.0) | SMALL | options   # by turn, equal outcomes are equal returns then
    t = TIRTrainer(policy or small_policy(), reward, TIRConfig(output_dir=str(folder), **options), make_tasks("arithmetic", n=1), environment_factory=PythonEnvironment)
    before = [p.detach().clone() for p in t.model.parameters()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        t.train()
    t.moved = max((a - b).abs().max().item() for a, b in zip(before, t.model.parameters()))
    t.said = [str(w.message) for w in said]
    return t


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_equal_rewards_beside_unscored_rollouts_move_nothing(advantage, tmp_path):
    t = trained(tmp_path, EQUAL["one unscored"], tiny_policy() if advantage in BY_TURN else None, advantage=advantage, trace=False)   # by turn: of several turns
    assert t.moved == 0 and t.state.log_history[0]["skipped_steps"] == 1.0


@pytest.mark.parametrize("rewards", EQUAL.values(), ids=EQUAL)
def test_whatever_is_unscored_and_wherever_it_stands(rewards, tmp_path):
    assert trained(tmp_path, rewards, trace=False).moved == 0


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_equal_sums_of_unequal_rewards_are_a_signal_only_where_they_are_compared_apart(aggregation, tmp_path):
    "Three functions whose sum is always 1: normalised each by itself, they differ."
    table = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.5, 0.2, 0.3], [0, 0, 1], [1, 0, 0], [0, 0.5, 0.5], [0.25, 0.25, 0.5], [0.5, 0.5, 0]], dtype=torch.float64)
    def make(i):
        def reward(completions, **kwargs): return table[:, i].tolist()
        reward.__name__ = f"part_{i}"
        return reward
    args = TIRConfig(output_dir=str(tmp_path), trace=False, multi_objective_aggregation=aggregation, **SMALL)
    t = TIRTrainer(small_policy(), [make(i) for i in range(3)], args, make_tasks("arithmetic", n=1), environment_factory=PythonEnvironment)
    t.train()
    assert t.state.log_history[0]["skipped_steps"] == float(aggregation == "sum_then_normalize")


@pytest.mark.parametrize("advantage", ESTIMATORS)
@pytest.mark.parametrize("unscored", [NAN, INF, -INF])
def test_estimators_leave_an_unscored_rollout_out_of_everything(advantage, unscored):
    "The group without it has the same advantages; its own are 0."
    table = torch.tensor([[0.0, 0.0, 1.0], [-0.1, 0.0, 0.9], [0.0, 0.2, NAN], [0.0, 0.0, 0.0], [1.0, NAN, NAN], [0.3, 0.1, 0.0], [0.2, 0.4, 0.4], [0.0, 1.0, 0.0]])
    spoilt = table.clone()
    spoilt[3] = torch.tensor([0.0, 0.0, unscored]) if unscored == unscored else NAN   # a rollout without any reward is a row of nan
    found = ESTIMATORS[advantage](spoilt, 8)
    rest = table[[i for i in range(8) if i != 3]]
    alone = ESTIMATORS[advantage](rest, 7)
    assert found[3].eq(0).all() and torch.allclose(found[[i for i in range(8) if i != 3]], alone, atol=1e-6) and found.isfinite().all()


def test_zero_variance_by_hand():
    groups = torch.tensor([[0.9, 0.9, 0.9], [0.9, NAN, 0.9], [NAN, NAN, NAN], [INF, 0.2, 0.2], [0.9, NAN, 0.8], [-INF, 0.1, 0.2], [NAN, NAN, 0.0]])
    assert zero_variance(groups.flatten(), 3).tolist() == [True, True, True, True, False, False, True]
    assert zero_variance(torch.tensor([1, 1, 0, 1]), 2).tolist() == [True, False]


@pytest.mark.parametrize("rewards, verdict", [([0.7] * 7 + [NAN], "zero variance"), ([0.7] * 7 + [INF], "zero variance"), ([NAN] * 8, "unscored"), ([INF] * 8, "unscored"),
                                              ([0.0, 1.0] + [NAN] * 6, "too few valid"), ([0.0, 1.0] + [-INF] * 6, "too few valid"), ([0.0, 1.0] * 3 + [NAN, INF], None)])
def test_verdicts_on_groups_with_unscored_rollouts(rewards, verdict):
    assert group_verdicts(torch.tensor(rewards), 8, min_std=1e-12, min_valid=4) == [verdict]


def test_totals_with_unscored_and_infinite_rewards():
    scores = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN], [INF, 2.0], [INF, -INF]])
    assert torch.equal(total_rewards(scores, torch.tensor([1.0, 0.5])).nan_to_num(-9), torch.tensor([2.0, 1.0, -9, -9, -9]))
    assert torch.equal(total_rewards(scores, torch.tensor([0.0, 0.5])).nan_to_num(-9), torch.tensor([1.0, 1.0, -9, 1.0, -9]))   # a reward that does not count may be anything


# ---- rewards that are no plain numbers


@pytest.mark.parametrize("advantage", ["grpo", "gtpo"])
def test_one_infinite_reward_costs_its_rollout_and_no_more(advantage, tmp_path):
    "The others learn as if it had not been scored, and it is said."
    rest, weights = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0], []
    for unscored in (None, INF, -INF):
        t = trained(tmp_path, [unscored] + rest, advantage=advantage, trace=False)
        said = [w for w in t.said if "infinite reward" in w]
        assert t.moved > 0 and len(said) == (unscored is not None) and all("`reward` gave an infinite reward: such a rollout counts as unscored" in w for w in said)
        assert all(np.isfinite(m[k]) for m in t.state.log_history for k in ("reward", "reward_std", "loss") if k in m)
        weights.append([p.detach().clone() for p in t.model.parameters()])
    assert all(torch.equal(a, b) for other in weights[1:] for a, b in zip(weights[0], other))


KINDS = {"tensor": torch.tensor([0.0, 1, 1, 0, 0, 1, 0, 0]), "tensors": list(torch.tensor([0.0, 1, 1, 0, 0, 1, 0, 0])), "numpy": np.array([0.0, 1, 1, 0, 0, 1, 0, 0], dtype=np.float32),
         "numpy booleans": list(np.array([0, 1, 1, 0, 0, 1, 0, 0], dtype=bool)), "booleans": [False, True, True, False, False, True, False, False], "ints": [0, 1, 1, 0, 0, 1, 0, 0],
         "numpy ints": list(np.array([0, 1, 1, 0, 0, 1, 0, 0])), "with None": [None, 1, True, np.float64(0), 0.0, np.bool_(1), None, 0]}


@pytest.mark.parametrize("rewards", KINDS.values(), ids=KINDS)
def test_rewards_of_any_number_type_mean_what_they_mean_to_trl(rewards, tmp_path):
    def reward(completions, **kwargs): return rewards
    common = dict(per_device_train_batch_size=8, num_generations=8, output_dir=str(tmp_path), report_to="none")
    ours = TIRTrainer(small_policy(), reward, TIRConfig(trace=False, **common), make_tasks("arithmetic", n=1))
    theirs = GRPOTrainer(small_policy(), reward, GRPOConfig(use_cpu=True, bf16=False, **common), make_tasks("arithmetic", n=1))
    rows, done = [dict(make_tasks("arithmetic", n=1)[0])] * 8, type("Done", (), dict(turns=[1], prompt_ids=[1], completion_ids=[1]))
    prompts = [r["prompt"] for r in rows]
    got, expected = score(ours, rows, prompts, [done] * 8), theirs._calculate_rewards(rows, prompts, [[{"role": "assistant", "content": ""}]] * 8, [[1]] * 8)
    assert torch.equal(got.nan_to_num(-9), expected.nan_to_num(-9)) and got.dtype == expected.dtype == torch.float32


# ---- estimators called by hand


@pytest.mark.parametrize("name", [*ESTIMATORS])
def test_estimators_take_integers_and_refuse_what_is_no_table(name):
    f, table = ESTIMATORS[name], torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0]])
    for kind in (torch.int64, torch.int32, torch.bool, torch.uint8):
        assert torch.equal(f(table.to(kind), 4), f(table.float(), 4))
    with pytest.raises(ValueError, match=r"rewards is a tensor of shape \(4,\); give .*rewards\[:, None\]"): f(torch.rand(4), 4)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 1\)"): f(torch.rand(2, 2, 1), 2)
    with pytest.raises(ValueError, match="rewards is a list; give a tensor"): f([[0.0, 1.0]] * 4, 4)
    with pytest.raises(ValueError, match="4 rollouts do not make whole groups of 3"): f(table, 3)


def test_what_estimators_are_made_of_takes_integers_and_refuses_what_is_no_table():
    table = torch.tensor([[0, 1], [0, 0]])
    assert torch.equal(discounted_returns(table), discounted_returns(table.float())) and torch.equal(pooled_advantages(table), pooled_advantages(table.float()))
    for kind in (torch.int64, torch.int32): assert spread_to_tokens(table, torch.tensor([[0, 1], [1, -1]], dtype=kind)).tolist() == [[0.0, 1.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match=r"turn_of_token has the shape \(3,\)"): spread_to_tokens(table, torch.tensor([0, -1, 1]))
    for f in (discounted_returns, pooled_advantages, lambda x: spread_to_tokens(x, x)):
        with pytest.raises(ValueError, match=r"shape \(4,\); give"): f(torch.rand(4))


def test_functions_of_outcomes_take_integers():
    ones = torch.tensor([1, 1, 0, 0])
    assert group_verdicts(ones, 2) == ["zero variance"] * 2
    assert torch.equal(baseline_rewards(ones, torch.tensor([True, False, False, False]), False).nan_to_num(9), torch.tensor([9.0, 1, 0, 0]))
    code = ["print(1)", "print(2)", "print(1)", ""]
    assert torch.equal(shaped_outcomes(ones, code, 4), shaped_outcomes(ones.float(), code, 4)) and shaped_outcomes(ones, code, 4)[2] > 0


def test_an_infinite_reward_is_on_record_as_it_was_given(tmp_path, monkeypatch):
    kept, fields = [], tirlab.trainer.trainer.row_fields
    monkeypatch.setattr(tirlab.trainer.trainer, "row_fields", lambda *args: kept.extend(fields(*args)) or [*kept])
    trained(tmp_path, [-INF, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, None])
    assert [f["reward"] for f in kept] == [-INF, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, None] == [f["rewards"]["reward"] for f in kept]
