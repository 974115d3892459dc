"""Every advantage estimator against tables worked out by hand, against slow readable loops, and against what must not matter."""

import functools
import inspect
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from tirlab.algorithms.advantages import (ESTIMATORS, compute_advantages, discounted_returns, dr_grpo, grpo, gtpo, lite_ppo, mt_grpo, pooled_advantages, reads_batch, rloo,
                               spread_to_tokens, tells_turns_apart, turn_rloo)
from tirlab.algorithms.facts import BatchFacts
from tirlab.core.settings import SettingError

nan = math.nan
FORMS = [(f, {}) for f in ESTIMATORS.values()] + [(rloo, dict(normalize_advantages=True)), (gtpo, dict(scale_rewards="batch"))]
FORMS += [(gtpo, dict(normalisation="first_return")), (gtpo, dict(normalisation="per_turn_index")),
          (gtpo, dict(normalisation="per_turn_index", scale_rewards="none"))]
every_form = pytest.mark.parametrize("estimate, options", FORMS, ids=[" ".join([f.__name__, *map(str, o.values())]) for f, o in FORMS])
few = settings(max_examples=15, deadline=None)


@st.composite
def batches(draw, values=st.sampled_from([-1.0, -0.5, -0.125, 0.0, 0.25, 0.75, 1.0]), unscored=True, equal_turns=False):
    "Rewards and group size, ragged, some rows without a turn or score. Eighths, so that equal sums are equal in floating point too."
    size, groups, most = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rows = []
    for _ in range(size * groups):
        turns = most if equal_turns else draw(st.integers(0 if unscored else 1, most))
        rows.append([draw(values) for _ in range(turns)] + [nan] * (most - turns))
    return torch.tensor(rows), size


def by_turn(advantages, rewards):
    "Advantages as a table, 0 where there was no turn."
    return advantages if advantages.dim() == 2 else advantages[:, None].expand(rewards.shape).masked_fill(rewards.isnan(), 0)


def outcome_of(rewards):
    "Where each rollout's last turn is."
    return (torch.arange(rewards.shape[1]) == (~rewards.isnan()).sum(1, keepdim=True) - 1)


# ---- worked out by hand

A = torch.tensor([[0.0, 1.0], [0.0, 0.0], [-0.1, 1.0], [-0.1, nan]])   # one group of four


def test_gtpo_by_hand():
    "gamma 0.5: returns 0.5, 1 | 0, 0 | 0.4, 1 | -0.1; seven turns, mean 0.4, squares of distances 0.01 0.36 0.16 0.16 0 0.36 0.25 sum to 1.3."
    std = math.sqrt(1.3 / 6) + 1e-4
    want = torch.tensor([[0.1, 0.6], [-0.4, -0.4], [0.0, 0.6], [-0.5, 0.0]]) / std
    assert torch.allclose(gtpo(A, 4, gamma=0.5), want, atol=1e-6)


def test_gtpo_by_turn_index_by_hand():
    "First turns 0.5 0 0.4 -0.1: mean 0.2, squares sum to 0.26. Second turns 1 0 1: mean 2/3, squares sum to 2/3."
    first, second = math.sqrt(0.26 / 3) + 1e-4, math.sqrt(1 / 3) + 1e-4
    want = torch.tensor([[0.3 / first, 1 / 3 / second], [-0.2 / first, -2 / 3 / second], [0.2 / first, 1 / 3 / second], [-0.3 / first, 0.0]])
    assert torch.allclose(gtpo(A, 4, gamma=0.5, normalisation="per_turn_index"), want, atol=1e-6)


def test_gtpo_by_first_return_by_hand():
    first = math.sqrt(0.26 / 3) + 1e-4
    want = torch.tensor([[0.3, 0.8], [-0.2, -0.2], [0.2, 0.8], [-0.3, 0.0]]) / first
    assert torch.allclose(gtpo(A, 4, gamma=0.5, normalisation="first_return"), want, atol=1e-6)


def test_a_turn_that_only_one_reached_is_measured_by_all():
    table = torch.tensor([[0.0, 1.0], [0.0, nan]])    # returns 1, 1 | 0
    mean, std = 2 / 3, math.sqrt(1 / 3) + 1e-4
    assert gtpo(table, 2, gamma=1.0, normalisation="per_turn_index")[0, 1].item() == pytest.approx((1 - mean) / std, abs=1e-6)
    assert turn_rloo(table, 2).tolist() == [[1.0, 1.0], [-1.0, 0.0]]   # the other's turns: 0


B = torch.tensor([[1.0], [1.0], [1.0], [0.0], [1.0], [0.0], [nan], [0.0]])   # two groups; one rollout unscored


@pytest.mark.parametrize("estimate, want", [
    (dr_grpo, [0.25, 0.25, 0.25, -0.75, 2 / 3, -1 / 3, 0, -1 / 3]),
    (grpo, [0.25 / 0.5, 0.25 / 0.5, 0.25 / 0.5, -0.75 / 0.5, 2 / 3 / 3 ** -0.5, -1 / 3 / 3 ** -0.5, 0, -1 / 3 / 3 ** -0.5]),
    (lite_ppo, [x / (12 / 7 / 6) ** 0.5 for x in (0.25, 0.25, 0.25, -0.75, 2 / 3, -1 / 3, 0, -1 / 3)]),     # four of seven right: squares sum to 12/7
    (rloo, [1 / 3, 1 / 3, 1 / 3, -1, 1, -0.5, 0, -0.5]),
    (turn_rloo, [1 / 3, 1 / 3, 1 / 3, -1, 1, -0.5, 0, -0.5]),
])
def test_rollouts_by_hand(estimate, want):
    assert estimate(B, 4).flatten().tolist() == pytest.approx(want, abs=5e-4)   # eps


def test_turn_rloo_by_hand():
    "gamma 1: returns 1, 1 | 0, 0 | 0.9, 1 | -0.1."
    want = [[1 - 0.8 / 3, 0.5], [-1.8 / 3, -1.0], [0.9 - 0.9 / 3, 0.5], [-0.1 - 1.9 / 3, 0.0]]
    assert torch.allclose(turn_rloo(A, 4), torch.tensor(want), atol=1e-6)


def test_mt_grpo_by_hand():
    "Outcomes 1 0 1 -0.1 and first turns 0 0 -0.1 of rollouts with two turns; the last rollout, of one turn, by its sum among 1 0 0.9 -0.1."
    outcome, turn, total = [1, 0, 1, -0.1], [0, 0, -0.1], [1, 0, 0.9, -0.1]
    z = lambda x, of: (x - statistics.mean(of)) / (statistics.stdev(of) + 1e-4)
    last = [z(x, outcome) for x in outcome]
    want = [[2 * last[0] + 0.5 * z(0, turn), last[0]], [2 * last[1] + 0.5 * z(0, turn), last[1]],
            [2 * last[2] + 0.5 * z(-0.1, turn), last[2]], [z(-0.1, total), 0.0]]
    assert torch.allclose(mt_grpo(A, 4, turn_weight=0.5, outcome_weight=2.0), torch.tensor(want), atol=1e-5)


# ---- slow and readable

def slow(rewards, size, gamma, normalisation, scale):
    "GTPO as it is written in the paper's order, with Python's own statistics."
    std = lambda x: statistics.stdev(x) if len(x) > 1 else 0.0
    table = [[(row[j], sum(gamma ** (m - j) * row[m] for m in range(j, len(row)))) for j in range(len(row))]
             for row in ([x for x in r if not math.isnan(x)] for r in rewards.tolist())]
    everything, result = [ret for row in table for _, ret in row], []
    for start in range(0, len(table), size):
        group = table[start:start + size]
        pooled = [ret for row in group for _, ret in row]
        for row in group:
            result.append([0.0] * rewards.shape[1])
            for j, (_, ret) in enumerate(row):
                same = [other[j][1] for other in group if len(other) > j]
                first = [other[0][1] for other in group if other]
                if std(first) < 1e-4: first = pooled
                over = {"pooled": pooled, "per_turn_index": same if len(same) > 1 else pooled, "first_return": first}[normalisation]
                divisor = {"group": std(over) + 1e-4, "batch": std(everything) + 1e-4, "none": 1.0}[scale]
                result[-1][j] = (ret - statistics.mean(over)) / divisor
    return torch.tensor(result)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("normalisation", ["pooled", "per_turn_index", "first_return"])
@few
@given(batch=batches(), gamma=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_gtpo_is_what_loops_say(normalisation, scale, batch, gamma):
    rewards, size = batch
    want = slow(rewards.double(), size, gamma, normalisation, scale)
    assert torch.allclose(gtpo(rewards.double(), size, gamma=gamma, normalisation=normalisation, scale_rewards=scale).float(), want, atol=1e-5)
    got = gtpo(rewards, size, gamma=gamma, normalisation=normalisation, scale_rewards=scale)
    assert torch.allclose(got, want, atol=5e-3)    # in float32, where spreads near 0 meet eps


@few
@given(batch=batches(), scale=st.sampled_from(["group", "batch", "none"]))
def test_grpo_is_trls(batch, scale):
    "The lines of GRPOTrainer._generate_and_score_completions, rows of None included."
    rewards, size = batch
    total = rewards.nansum(1).masked_fill(rewards.isnan().all(1), nan)
    grouped = total.view(-1, size)
    std = nanstd(grouped, dim=1, keepdim=True) if size > 1 else torch.zeros(len(grouped), 1)
    if scale == "batch": std = nanstd(total) if total.numel() > 1 else torch.zeros(())
    away = grouped - torch.nanmean(grouped, dim=1, keepdim=True)
    want = (away if scale == "none" else away / (std + 1e-4)).nan_to_num().view(-1, 1).expand(rewards.shape)
    # TRL's mean of equal numbers may be a rounding error away from them, which eps magnifies; ours is not
    assert torch.allclose(by_turn(grpo(rewards, size, scale_rewards=scale), rewards), want.masked_fill(rewards.isnan(), 0), atol=5e-3)


@few
@given(batch=batches(), normalise=st.booleans())
def test_rloo_is_trls(batch, normalise):
    "The lines of RLOOTrainer, rows of None included."
    rewards, size = batch
    total = rewards.nansum(1).masked_fill(rewards.isnan().all(1), nan)
    grouped = total.view(-1, size)
    scored = (~grouped.isnan()).sum(1, keepdim=True)
    away = total - ((grouped.nansum(1, keepdim=True) - grouped) / (scored - 1)).view(-1) if size > 1 else torch.zeros_like(total)
    away = torch.where(away.isinf(), nan, away)    # one scored rollout: 0/0 in exact numbers
    if normalise: away = (away - torch.nanmean(away)) / (nanstd(away) + 1e-4)
    want = away.nan_to_num()[:, None].expand(rewards.shape).masked_fill(rewards.isnan(), 0)
    assert torch.allclose(by_turn(rloo(rewards, size, normalize_advantages=normalise), rewards), want, atol=5e-3)


@pytest.mark.parametrize("estimate, options", [(turn_rloo, dict(gamma=0.5)), (turn_rloo, dict(gamma=1.0))], ids=["0.5", "1"])
@few
@given(batch=batches())
def test_turn_rloo_is_what_loops_say(estimate, options, batch):
    rewards, size = batch
    returns = discounted_returns(rewards, **options)
    want = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        others = [k for k in range(i // size * size, i // size * size + size) if k != i]
        for j in range(rewards.shape[1]):
            if returns[i, j].isnan(): continue
            same = [returns[k, j].item() for k in others if not returns[k, j].isnan()]
            anything = [x.item() for k in others for x in returns[k] if not x.isnan()]
            if same or anything: want[i, j] = returns[i, j] - statistics.mean(same or anything)
    assert torch.allclose(turn_rloo(rewards, size, **options), want, atol=1e-5)


# ---- what must not matter

@every_form
@few
@given(batch=batches(), data=st.data())
def test_the_order_of_a_group_does_not_matter(estimate, options, batch, data):
    rewards, size = batch
    order = torch.cat([torch.tensor(data.draw(st.permutations(range(start, start + size)))) for start in range(0, len(rewards), size)])
    assert torch.allclose(estimate(rewards[order], size, **options), estimate(rewards, size, **options)[order], atol=1e-3)


@every_form
@few
@given(batch=batches(unscored=False), constant=st.sampled_from([-1.0, 0.5, 3.0]))
def test_a_constant_outcome_for_all_does_not_matter(estimate, options, batch, constant):
    "Without discounting. (With it, GTPO's turns move against each other: the notebook shows how.)"
    rewards, size = batch
    options = options | ({"gamma": 1.0} if "gamma" in inspect.signature(estimate).parameters else {})
    more = torch.where(outcome_of(rewards), rewards + constant, rewards)
    assert torch.allclose(estimate(more.double(), size, **options), estimate(rewards.double(), size, **options), atol=1e-6)


@pytest.mark.parametrize("estimate, options", [(gtpo, dict(normalisation="per_turn_index")), (gtpo, dict(normalisation="per_turn_index", gamma=0.5)),
                                               (turn_rloo, dict(gamma=0.5)), (mt_grpo, {}), (grpo, {}), (rloo, {})])
@few
@given(batch=batches(equal_turns=True), constant=st.sampled_from([-1.0, 0.5, 3.0]))
def test_a_constant_in_every_turn_does_not_matter_where_all_have_as_many(estimate, options, batch, constant):
    rewards, size = batch
    if size == 1 and estimate is gtpo: return    # a lone rollout's turns are compared with each other
    assert torch.allclose(estimate(rewards.double() + constant, size, **options), estimate(rewards.double(), size, **options), atol=1e-6)


def test_discounting_makes_a_constant_matter():
    assert not torch.allclose(gtpo(A + 1, 4, gamma=0.9), gtpo(A, 4, gamma=0.9), atol=0.1)


@every_form
@few
@given(batch=batches(), data=st.data())
def test_other_groups_do_not_matter(estimate, options, batch, data):
    "A group's numbers are the same alone; what they are divided by may be the batch's."
    rewards, size = batch
    if options.get("scale_rewards") == "batch" or options.get("normalize_advantages") or estimate is lite_ppo: return
    alone = torch.cat([estimate(group, size, **options) for group in rewards.split(size)])
    assert torch.equal(alone, estimate(rewards, size, **options))


@every_form
@few
@given(batch=batches())
def test_always_finite_and_zero_where_nothing_happened(estimate, options, batch):
    rewards, size = batch
    got = estimate(rewards, size, **options)
    assert got.shape == (rewards.shape if tells_turns_apart(estimate.__name__) else rewards.shape[:1])
    assert got.isfinite().all() and (got[rewards.isnan()] if got.dim() == 2 else got[rewards.isnan().all(1)]).eq(0).all()
    more = estimate(torch.cat([rewards, torch.full_like(rewards, nan)]), size, **options)   # whole groups of rollouts that nobody scored
    assert torch.allclose(more[:len(rewards)], got, atol=1e-6) and more[len(rewards):].eq(0).all()


@every_form
def test_no_signal_is_exactly_no_gradient(estimate, options):
    "All rewards equal, all turns as many: exactly zero, not a rounding error that Adam would follow."
    options = options | ({"gamma": 1.0} if "gamma" in inspect.signature(estimate).parameters else {})
    for size in (1, 2, 7, 8):
        failed = torch.full((2 * size, 3), nan)
        assert estimate(failed, size, **options).eq(0).all()
        for reward in (0.0, 0.7, -0.1, 1 / 3):
            rewards, one = torch.zeros(2 * size, 3), failed.clone()
            rewards[:, -1] = one[0, 0] = reward
            assert estimate(rewards, size, **options).eq(0).all() and estimate(one, size, **options).eq(0).all()


@every_form
def test_no_turns_at_all(estimate, options):
    got = estimate(torch.empty(4, 0), 2, **options)
    assert got.shape == ((4, 0) if tells_turns_apart(estimate.__name__) else (4,)) and got.eq(0).all()
    assert spread_to_tokens(torch.empty(4, 0), torch.full((4, 6), -1)).eq(0).all()


@every_form
@few
@given(batch=batches(), data=st.data())
def test_tokens_get_their_turns_advantage(estimate, options, batch, data):
    rewards, size = batch
    turns = (~rewards.isnan()).sum(1).tolist()
    writer = torch.tensor([[data.draw(st.integers(-1, n - 1)) for _ in range(6)] for n in turns])
    table = by_turn(estimate(rewards, size, **options), rewards)
    by_token = spread_to_tokens(table, writer)
    for i in range(len(rewards)):
        assert by_token[i].tolist() == [table[i, j].item() if j >= 0 else 0.0 for j in writer[i].tolist()]


def test_observations_stay_zero_beside_numbers_that_are_not():
    "Zero times infinity is nan; a column of zeros is not multiplied with anything."
    assert spread_to_tokens(torch.tensor([[nan, torch.inf]]), torch.tensor([[-1, 1, -1]])).tolist() == [[0.0, torch.inf, 0.0]]


# ---- algorithms.md §5, trap 1

@few
@given(score=st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=4, max_size=4), turns=st.integers(1, 5))
def test_gtpo_without_discount_and_turn_rewards_is_grpo(score, turns):
    "Exactly with the population's deviation; with the sample's the pooled set has more members, and all tokens differ by one factor."
    rewards = torch.zeros(4, turns)
    rewards[:, -1] = torch.tensor(score)
    total = torch.tensor(score)
    want = ((total - total.mean()) / (total.std(correction=0) + 1e-4))[:, None].expand(4, turns)
    assert torch.allclose(gtpo(rewards, 4, gamma=1.0, ddof=0), want, atol=1e-5)
    factor = math.sqrt((4 * turns - 1) / (turns * 3))
    plain = by_turn(grpo(rewards, 4), rewards)
    assert torch.allclose(gtpo(rewards, 4, gamma=1.0), factor * plain, rtol=2e-3, atol=1e-6)
    assert torch.allclose(gtpo(rewards, 4, gamma=1.0, normalisation="first_return"), plain, atol=1e-6)


def test_one_group_is_pooled_advantages():
    assert torch.equal(gtpo(A, 4, gamma=0.9), pooled_advantages(discounted_returns(A, 0.9)))
    assert torch.equal(gtpo(torch.cat([A, A[:2], A[:2]]), 4)[:4], gtpo(A, 4))


# ---- wrong input

@pytest.mark.parametrize("call, said", [
    (lambda: gtpo(A, 3), "4 rollouts do not make whole groups of 3."),
    (lambda: grpo(A, 0), "4 rollouts do not make whole groups of 0."),
    (lambda: gtpo(A, 4, normalisation="none"), "normalisation='none' is unknown; choose 'pooled', 'per_turn_index' or 'first_return'."),
    (lambda: grpo(A, 4, scale_rewards="std"), "scale_rewards='std' is unknown; choose 'group', 'batch' or 'none'."),
])
def test_wrong_input_in_one_sentence(call, said):
    with pytest.raises(ValueError) as error: call()
    assert str(error.value) == said


def test_all_are_called_the_same_way():
    for name, estimate in ESTIMATORS.items():
        takes = inspect.signature(estimate).parameters
        assert list(takes)[:3] == ["rewards", "group_size", "batch"] and estimate.__name__ == name
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(takes.values())[2:]) and not reads_batch(name) and reads_batch(estimate)


# ---- first returns that do not differ


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_first_returns_do_not_divide_by_eps(scale):
    "Such a group is measured by all its turns; another group of the batch is not touched."
    flat, other = torch.tensor([[0.0, 0.0, 1.0]] * 3 + [[0.81, nan, nan]]), torch.tensor([[0.0, 1.0, nan], [0.0, 0.0, 0.0], [-0.1, 1.0, nan], [-0.1, nan, nan]])
    first = lambda x: gtpo(x, 4, normalisation="first_return", scale_rewards=scale)
    assert first(flat).abs().max() < 3 and torch.allclose(first(flat), gtpo(flat, 4, scale_rewards=scale), atol=1e-6)
    if scale != "batch": assert torch.equal(first(torch.cat([flat, other]))[4:], first(other)) and not torch.allclose(first(other), gtpo(other, 4, scale_rewards=scale))


# ---- by name, and functions of the user's


FACTS = BatchFacts([], [], torch.zeros(4))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_name_and_its_function_are_the_same(name):
    given = dict(gamma=0.5, normalisation="per_turn_index", scale_rewards="none", turn_weight=2.0, outcome_weight=0.5)
    takes = inspect.signature(ESTIMATORS[name]).parameters
    want = ESTIMATORS[name](A, 4, **{k: v for k, v in given.items() if k in takes})
    assert torch.equal(compute_advantages(name, A, 4, FACTS, **given), want) and torch.equal(compute_advantages(ESTIMATORS[name], A, 4, FACTS, **given), want)


def test_a_function_gets_what_it_names():
    got = {}
    def every(rewards, group_size, *, batch, gamma, scale_rewards): got.update(locals()); return rewards
    assert torch.equal(compute_advantages(every, A, 4, FACTS, gamma=0.5, scale_rewards="none", normalisation="pooled"), A.nan_to_num())
    assert got["batch"] is FACTS and (got["gamma"], got["scale_rewards"], got["group_size"]) == (0.5, "none", 4)
    assert compute_advantages(lambda rewards, group_size: rewards.nansum(1), A, 4).tolist() == pytest.approx([1.0, 0.0, 0.9, -0.1])
    assert compute_advantages(functools.partial(gtpo, gamma=0.0), A, 4).equal(gtpo(A, 4, gamma=0.0))


def test_what_never_happened_is_0_and_has_no_graph():
    table = torch.tensor([[0.0, 1.0], [nan, nan]])
    assert compute_advantages(lambda rewards, group_size: rewards, table, 2).tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert compute_advantages(lambda rewards, group_size: rewards.sum(1), table, 2).tolist() == [1.0, 0.0]
    critic = torch.ones(2, requires_grad=True)
    found = compute_advantages(lambda rewards, group_size: (rewards.nansum(1) - critic).double(), table, 2)
    assert not found.requires_grad and found.dtype == torch.float32


@pytest.mark.parametrize("result", [None, 1.0, [1.0] * 4, torch.zeros(()), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4, 1), torch.zeros(2, 4), torch.zeros(4, 2, 1)])
def test_a_wrong_shape_names_what_was_wanted(result):
    def wrong(rewards, group_size): return result
    with pytest.raises(SettingError) as error: compute_advantages(wrong, A, 4)
    found = str(tuple(result.shape)) if isinstance(result, torch.Tensor) else type(result).__name__
    assert (error.value.field, error.value.value) == ("advantage", wrong) and all(w in str(error.value) for w in ("wrong", found, "(4,)", "(4, 2)")) and "\n" not in str(error.value)


@pytest.mark.parametrize("number", [nan, math.inf, -math.inf])
@pytest.mark.parametrize("turns", [True, False])
def test_advantages_that_are_no_numbers(number, turns):
    table = torch.zeros(4, 2) if turns else torch.zeros(4)
    table[2] = number
    with pytest.raises(SettingError, match="rollout 2") as error: compute_advantages(lambda rewards, group_size: table, A, 4)
    assert error.value.field == "advantage"
