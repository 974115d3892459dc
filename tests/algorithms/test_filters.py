"""Filters by hand and against TRL's own loss: what is left out has no gradient, the rest is as if it had never been. And which prompts come next."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import LOSSES, Bare, batch, gradient

from tirlab.algorithms.facts import BatchFacts
from tirlab.algorithms.filters import (FILTERS, baseline_rewards, drop_rows, filter_tokens, filtered_mask, group_verdicts, has_answer, high_ratio_filter,
                            loss_tokens, low_prob_filter, overlong, plan_batch, void_filter, void_turns)
from tirlab.algorithms.prompts import Curriculum, MoPPS, Replay
from tirlab.core.settings import SettingError
from tirlab.core.trajectory import StopReason, ToolCall, ToolError, ToolResult, Trajectory, Turn, TurnKind

NAN = float("nan")
CALL = ToolCall("python", {"code": "1"})
BOXED = has_answer(r"\\boxed")
TOKEN_MEANS = ("bnpo", "dapo", "cispo", "vespo")   # the others divide by rows


def turn(n=2, text="", *calls, kind=None, observed=0):
    kind = kind or (TurnKind.TOOL_CALL if calls else TurnKind.RESPONSE)
    return Turn(list(range(n)), {"role": "assistant", "content": text}, kind, list(calls), observation_ids=[0] * observed)


def call(n=2, observed=1): return turn(n, "", CALL, observed=observed)


# Void turns

@pytest.mark.parametrize("last, boxed, plain", (
    (turn(2, r"so \boxed{4}"), False, False), (turn(2, "The answer is 4"), True, False), (turn(2, "  "), True, True), (turn(0, ""), True, True),
    (turn(2, '<tool_call>{"name', kind=TurnKind.TEXT_POLLUTION), True, True), (turn(1, "", kind=TurnKind.COLLAPSED), True, True),
    (turn(2, r"<tool_call> \boxed{4}", kind=TurnKind.TEXT_POLLUTION), False, True), (call(), False, False),
    (Turn([1], {"role": "assistant", "content": None}, TurnKind.RESPONSE), True, True)))
def test_what_is_void(last, boxed, plain):
    t = Trajectory([1], [call(), last], StopReason.ANSWER)
    assert void_turns(t, BOXED) == [False, boxed] and void_turns(t, has_answer()) == [False, plain]


def test_a_call_beside_an_answer_and_a_failed_rollout():
    assert void_turns(Trajectory([1], [turn(2, "hm", CALL)], StopReason.MAX_TURNS), BOXED) == [False]
    assert void_turns(Trajectory([1], [], StopReason.FAILED), BOXED) == []


def slow_filter(trajectories, width, suffix):
    "Token by token."
    rows = []
    for t in trajectories:
        void, row, seen = [not u.calls and r"\boxed" not in u.message["content"] for u in t.turns], [], False
        for u, v in zip(t.turns, void):
            seen = seen or v
            row += [not (seen if suffix else any(void))] * (len(u.ids) + len(u.observation_ids))
        rows.append((row + [not (any(void))] * width)[:width])
    return torch.tensor(rows).reshape(len(trajectories), width)


turns = st.builds(lambda n, what, o: {"call": call(n, o), "answer": turn(n, r"\boxed{1}"), "void": turn(n, "hm", observed=o)}[what],
                  st.integers(1, 3), st.sampled_from(["call", "call", "answer", "void"]), st.integers(0, 2))
rollouts = st.lists(st.builds(lambda ts: Trajectory([1], ts, StopReason.ANSWER), st.lists(turns, max_size=4)), min_size=1, max_size=5)


@given(rollouts, st.booleans())
@settings(max_examples=200, deadline=None)
def test_void_filter_is_the_loop(trajectories, suffix):
    width = max(1, *(len(t.completion_ids) for t in trajectories))
    keep, reasons = void_filter(trajectories, torch.ones(len(trajectories), width), answered=BOXED, suffix=suffix)
    assert keep.equal(slow_filter(trajectories, width, suffix))
    for row, reason in zip(keep, reasons): assert (reason is None) == bool(row.all())


# Improbable tokens, high ratios

def test_low_prob_and_high_ratio_by_hand():
    logps, mask = torch.tensor([[-0.1, -9.0, -0.1], [-0.1, -9.0, -9.0], [NAN, -0.1, -0.1]]), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1]])
    facts = BatchFacts([], [], torch.zeros(3), logps, torch.tensor([[6.0, 7.0], [5.0, NAN]]))
    assert low_prob_filter([], mask, batch=facts, threshold=1e-3, whole=False)[0].tolist() == [[True, False, True], [True] * 3, [True] * 3]
    keep, reasons = low_prob_filter([], mask, batch=facts, threshold=1e-3)
    assert keep.all(1).tolist() == [False, True, True] and not keep[0].any() and reasons == ["1 token with probability below 0.001", None, None]
    keep, reasons = high_ratio_filter([], torch.ones(2, 2), batch=facts, threshold=5.0, whole=False)
    assert keep.tolist() == [[False, False], [True, True]] and reasons == ["2 tokens with ratio above 5", None]


def test_filters_by_name():
    x = [Trajectory([1], [call(2, 1), turn(2, "hm")], StopReason.VOID)], torch.ones(1, 5, dtype=torch.long)
    facts = BatchFacts(x[0], [{}], torch.zeros(1), torch.tensor([[-8.0] + [-0.1] * 4]), torch.tensor([[1.0, 9.0, 1.0, 1.0, 1.0]]))
    kept = {n: filter_tokens(n, *x, facts, answered=BOXED, threshold=2.0 if n == "high_ratio" else 0.01, whole=False)[0][0].int().tolist() for n in FILTERS}
    assert kept == {"none": [1] * 5, "stop_only": [1] * 5, "trajectory": [0] * 5, "suffix": [1, 1, 1, 0, 0],
                    "low_prob": [0, 1, 1, 1, 1], "high_ratio": [1, 0, 1, 1, 1]}
    with pytest.raises(ValueError, match="Unknown filter"): filter_tokens("voids", *x)
    for name in ("low_prob", "high_ratio"):
        with pytest.raises(ValueError, match="threshold"): filter_tokens(name, *x, facts)


@pytest.mark.parametrize("name", FILTERS)
def test_a_name_and_its_function_mask_the_same(name):
    x = [Trajectory([1], [call(2, 1), turn(2, "hm")], StopReason.VOID)], torch.ones(1, 5, dtype=torch.long)
    facts = BatchFacts(x[0], [{}], torch.zeros(1), torch.tensor([[-8.0] + [-0.1] * 4]), torch.tensor([[1.0, 9.0, 1.0, 1.0, 1.0]]))
    (keep, reasons), (again, told) = (filter_tokens(f, *x, facts, answered=BOXED, threshold=0.5) for f in (name, FILTERS[name]))
    assert torch.equal(keep, again) and [r is None for r in reasons] == [r is None for r in told] and all(r.split(": ")[1] in reasons for r in told if r)


def test_a_filter_of_the_users():
    "It gets what it names; its name stands in every reason; a row that keeps all its tokens has none."
    rollouts, mask, got = [Trajectory([1], [turn(2, "a")], StopReason.ANSWER)] * 3, torch.tensor([[1, 1, 0]] * 3), {}
    facts = BatchFacts(rollouts, [{}] * 3, torch.zeros(3))
    def later(trajectories, mask, *, batch, threshold):
        got.update(batch=batch, threshold=threshold)
        return torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 0]]), ["bad; worse", "no matter", None]
    keep, reasons = filter_tokens(later, rollouts, mask, facts, answered=BOXED, threshold=0.5)
    assert keep.dtype == torch.bool and keep.int().tolist() == [[1, 0, 1], [1, 1, 1], [1, 0, 0]] and got == dict(batch=facts, threshold=0.5)
    assert reasons == ["later: bad, worse", None, "later"]


@pytest.mark.parametrize("result", [None, torch.ones(2, 3), (torch.ones(2, 3),), (torch.ones(2, 3), [None], 1), (torch.ones(3), [None] * 2), (torch.ones(3, 2), [None] * 2),
                                    ([[1] * 3] * 2, [None] * 2), (torch.ones(2, 3), [None]), (torch.ones(2, 3), None)])
def test_a_filter_that_returns_no_mask(result):
    with pytest.raises(SettingError, match=r"\(2, 3\)") as error: filter_tokens(lambda trajectories, mask: result, [], torch.ones(2, 3))
    assert error.value.field == "void_filter" and "\n" not in str(error.value)


# In the loss: traps 3 and 4 of the specification

def without(x, rows):
    "The batch without some of its rows."
    return {k: v if v.dim() == 0 else v[rows] for k, v in x.items()}


@pytest.mark.parametrize("by_token", (True, False))
@pytest.mark.parametrize("kind", LOSSES)
def test_a_dropped_row_has_no_gradient_and_the_rest_is_the_batch_without_it(kind, by_token):
    "Through TRL's own loss, with a KL term and an entropy bonus. Losses that divide by rows go on counting those that were dropped."
    logits, x = batch(rows=5, by_token=by_token, seed=1)
    keep, _ = drop_rows(torch.ones_like(x["completion_mask"], dtype=torch.bool), [None] * 5, [None, "void turn 0", None, None, "void turn 1"])
    x["tool_mask"] = filtered_mask(x["completion_mask"], x["tool_mask"], keep)
    x["num_items_in_batch"] = loss_tokens(x["completion_mask"], x["tool_mask"])
    rows = [0, 2, 3]
    for options in (dict(beta=0.1), dict(beta=0.1, entropy_coef=0.1)):
        ours = gradient(Bare(logits, kind, **options).plain(x), logits)
        assert ours[[1, 4]].eq(0).all() and ours[rows].abs().sum() > 0
        parts = [gradient(Bare(logits[rows], kind, **o).plain(without(x, rows)), logits)[rows] for o in (options, dict(beta=0.1))]
        policy, bonus = parts[1], parts[0] - parts[1]   # the bonus is a mean over tokens, whatever the loss
        assert torch.allclose(ours[rows], policy * (1 if kind in TOKEN_MEANS else 3 / 5) + bonus, atol=1e-12)


@pytest.mark.parametrize("kind", ("dapo", "cispo", "vespo"))
def test_without_counting_again_dropped_tokens_would_stay_in_the_denominator(kind):
    logits, x = batch(seed=1)
    before = x["num_items_in_batch"]
    x["tool_mask"] = filtered_mask(x["completion_mask"], x["tool_mask"], torch.tensor([1, 0, 1, 1]).bool()[:, None].expand(4, 9))
    after = loss_tokens(x["completion_mask"], x["tool_mask"])
    assert after < before
    stale, fresh = (gradient(Bare(logits, kind).plain(x | {"num_items_in_batch": n}), logits) for n in (before, after))
    assert torch.allclose(stale * before, fresh * after)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_that_is_all_void_gives_zero_and_no_nan(kind):
    logits, x = batch()
    x["tool_mask"] = filtered_mask(x["completion_mask"], None, torch.zeros(4, 9, dtype=torch.bool))
    x["num_items_in_batch"] = loss_tokens(x["completion_mask"], x["tool_mask"])
    loss = Bare(logits, kind, beta=0.1, entropy_coef=0.1).plain(x)
    assert loss == 0 and gradient(loss, logits).eq(0).all()


def test_masks_keep_their_kind():
    "TRL's masks are integers, and nothing but `tool_mask` changes."
    _, x = batch()
    before = {k: v.clone() for k, v in x.items()}
    out = filtered_mask(x["completion_mask"], None, torch.ones(4, 9, dtype=torch.bool))
    assert out.dtype == torch.int64 and out.eq(1).all() and all(x[k].equal(before[k]) for k in x)
    assert loss_tokens(x["completion_mask"]) == x["completion_mask"].sum() and loss_tokens(x["completion_mask"], x["tool_mask"]).dtype == torch.int64


def test_void_rollouts_in_the_baseline_or_not():
    rewards, void = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([False, False, True, True])
    assert baseline_rewards(rewards, void) is rewards
    alone = baseline_rewards(rewards, void, in_baseline=False)
    assert alone[:2].equal(rewards[:2]) and alone[2:].isnan().all() and alone.nanmean() == 0.5 and rewards.mean() == 0.25
    assert baseline_rewards(torch.ones(4, 3), void, False)[2:].isnan().all()


# Groups

@pytest.mark.parametrize("rewards, options, verdict", (
    ([1, 0], {}, None), ([1, 1], {}, "zero variance"), ([0, 0], {}, "zero variance"), ([1, 1], dict(min_std=None), None),
    ([NAN, NAN], {}, "unscored"),
    ([1, NAN], {}, "zero variance"), ([1, 0, NAN], {}, None), ([1], {}, "zero variance"), ([1], dict(min_std=None), None),
    ([0, 0.0013], {}, "zero variance"), ([0, 0.0015], {}, None),
    ([1, 0, 0, 0], dict(band=(0.3, 0.9)), "too hard"), ([1, 1, 1, 0], dict(band=(0.1, 0.7)), "too easy"),
    ([1, 0, 0, 0], dict(band=(0.25, 0.75)), None),
    ([1, 0], dict(overlong=[True, True]), "all overlong"), ([1, 0], dict(overlong=[True, False]), None),
    ([1, 0], dict(overlong=[True, False], min_valid=2), "too few valid"),
    ([1, 0, NAN], dict(min_valid=3), "too few valid"), ([1, 1], dict(overlong=[True, True]), "zero variance")))
def test_group_verdicts_by_hand(rewards, options, verdict):
    if "overlong" in options: options = options | {"overlong": torch.tensor(options["overlong"])}
    assert group_verdicts(torch.tensor(rewards, dtype=torch.float), len(rewards), **options) == [verdict]


@given(st.lists(st.floats(-2, 2), min_size=12, max_size=12), st.permutations(range(4)), st.permutations(range(3)))
@settings(max_examples=100, deadline=None)
def test_verdicts_do_not_depend_on_order(rewards, within, between):
    table, options = torch.tensor(rewards).reshape(3, 4), dict(band=(-1.0, 1.0), min_valid=2)
    verdicts = group_verdicts(table.flatten(), 4, **options)
    assert group_verdicts(table[:, list(within)].flatten(), 4, **options) == verdicts
    assert group_verdicts(table[list(between)].flatten(), 4, **options) == [verdicts[i] for i in between]


def test_overlong_goes_by_the_stop_reason():
    stops = {s: overlong([Trajectory([1], [turn()], s)])[0] for s in StopReason}
    assert {s for s, long in stops.items() if long} == {StopReason.LENGTH, StopReason.CONTEXT}


def test_rows_are_dropped_with_all_their_reasons():
    keep, before = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool(), [None, "from void turn 1 on", "void turn 0"]
    keep, reasons = drop_rows(keep, before, ["zero variance", None, "zero variance"])
    assert keep.int().tolist() == [[0, 0], [1, 0], [0, 0]] and reasons == ["zero variance", "from void turn 1 on", "void turn 0; zero variance"]


@given(st.lists(st.sampled_from([None, "zero variance"]), max_size=12), st.integers(1, 8), st.floats(1, 4), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_plan_fills_the_batch_and_never_trains_on_a_dropped_group(verdicts, wanted, oversample, last, repeat):
    plan, kept = plan_batch(verdicts, wanted, oversample, last, repeat), verdicts.count(None)
    assert len(plan.slots) == len(plan.live) <= wanted
    for slot, live in zip(plan.slots, plan.live): assert (verdicts[slot] is None) == live
    if kept >= wanted: assert plan.more == 0 and plan.slots == [i for i, v in enumerate(verdicts) if v is None][:wanted]
    elif not last: assert plan.more == math.ceil((wanted - kept) * oversample) >= wanted - kept and len(plan.slots) == kept
    else: assert plan.more == 0 and (len(verdicts) < wanted or len(plan.slots) == wanted)
    if not repeat: assert len(set(plan.slots)) == len(plan.slots)


# Which prompts come next

def test_mopps_counts_by_hand():
    m = MoPPS(10, decay=0.5, prior=(1.0, 2.0))
    m.update([3], [4], [8])
    m.update([3], [1], [8])
    assert m.counts == {3: [0.5 * (0.5 * 1 + 0.5 * 1 + 4) + 0.5 * 1 + 1, 0.5 * (0.5 * 2 + 0.5 * 2 + 4) + 0.5 * 2 + 7]}
    plain = MoPPS(10)
    plain.update([0, 0], [8, 0], [8, 8])
    assert plain.counts == {0: [9.0, 9.0]}


def test_mopps_prefers_what_is_neither_hopeless_nor_trivial():
    m = MoPPS(30, pool=30, seed=1)
    m.update(list(range(30)), [0] * 10 + [50] * 10 + [100] * 10, [100] * 30)
    assert all(sorted(m.choose(10)) == list(range(10, 20)) for _ in range(5))


@pytest.mark.parametrize("make", (lambda seed=0: MoPPS(50, seed=seed), lambda seed=0: Curriculum(list(range(50)), 20, seed=seed)))
def test_choices_repeat_with_the_seed_and_survive_a_checkpoint(make):
    a, b, c = make(), make(), make(seed=1)
    first = [a.choose(8) for _ in range(3)]
    assert first == [b.choose(8) for _ in range(3)] != [c.choose(8) for _ in range(3)]
    if isinstance(a, MoPPS): a.update(first[0], [1] * 8, [2] * 8)
    d = make()
    d.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert d == a and [d.choose(8) for _ in range(3)] == [a.choose(8) for _ in range(3)]
    assert all(isinstance(r, int) for r in d.choose(8))


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_choices_are_rows_as_many_as_wanted(size, count, draws):
    difficulty = random.Random(size).choices(range(5), k=size)
    curriculum = Curriculum(difficulty, 10, draws=draws)
    allowed = sorted(difficulty)[:math.ceil(curriculum.share() * size - 1e-9)]
    for sampler in (MoPPS(size, draws=draws), curriculum):
        rows = sampler.choose(count)
        assert len(rows) == count and set(rows) <= set(range(size)) and (count > size or sampler is curriculum or len(set(rows)) == count)
    assert all(difficulty[r] <= allowed[-1] for r in rows)


def test_the_curriculum_opens_as_the_formula_says():
    c = Curriculum(list(range(1000)), steps=100, start=0.1)
    shares = [Curriculum(c.difficulty, 100, 0.1, draws=t).share() for t in (0, 25, 100, 500)]
    assert np.allclose(shares, [0.1, math.sqrt(0.25 * 0.99 + 0.01), 1.0, 1.0])


def rollout(answer="4"):
    called = {"type": "function", "function": {"name": "python", "arguments": {"code": "2+2"}}}
    results = [ToolResult("python", "4"), ToolResult("x", "no", ToolError.UNKNOWN, 0.5, True)]
    asks = Turn([1, 2], {"role": "assistant", "content": "", "tool_calls": [called]}, TurnKind.TOOL_CALL,
                [ToolCall("python", {"code": "2+2"})], results, [5, 6], [-0.1, -0.2], 0.3)
    return Trajectory([9, 8], [asks, Turn([3], {"role": "assistant", "content": answer}, TurnKind.RESPONSE, logprobs=[-0.5])], StopReason.ANSWER)


def test_replay_keeps_the_latest_successes_in_order():
    r = Replay(size=2)
    for answer, reward in (("a", 1.0), ("b", 0.0), ("c", 1.0), ("d", NAN), ("e", 0.5)): r.add("t", rollout(answer), reward)
    r.add("t", Trajectory([1], [], StopReason.FAILED), 1.0)
    assert [(t.turns[-1].message["content"], reward) for t, reward, _ in r.kept["t"]] == [("c", 1.0), ("e", 0.5)]
    assert all(t.logprobs is None and t.completion_ids == rollout().completion_ids for t, *_ in r.kept["t"])


@pytest.mark.parametrize("rewards, found", (([0, 0], True), ([-1, 0], True), ([NAN, 0], True), ([0, 1], False), ([NAN, NAN], False), ([], False)))
def test_replay_steps_in_only_where_all_failed(rewards, found):
    r = Replay()
    assert r.replacement("t", rewards) is None
    r.add("t", rollout(), 1.0)
    assert (r.replacement("t", rewards) is not None) == found and r.replacement("other", rewards) is None


def test_replay_survives_a_checkpoint_as_plain_data():
    r, s = Replay(seed=3), Replay(seed=3)
    for i in range(6): r.add("t", rollout(str(i)), 1.0)
    r.replacement("t", [0.0])
    s.load_state_dict(json.loads(json.dumps(r.state_dict())))
    assert s == r and isinstance(s.kept["t"][0][0].turns[0].results[1].error, ToolError) and s.kept["t"][0][0].stop is StopReason.ANSWER
    assert [s.replacement("t", [0.0]) for _ in range(4)] == [r.replacement("t", [0.0]) for _ in range(4)]
