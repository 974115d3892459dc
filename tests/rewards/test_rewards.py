"""Rewards against tables worked out by hand, slow readable loops, and what must never be: alike in every process, bounded, one number a row."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tirlab.rewards import outcome as rewards_room
from tirlab.all import TIRConfig, TIRTrainer, make_tasks, tiny_policy
from tirlab.rewards.confidence import agreement, agreement_reward, calibrated, clusters, rlcr_reward, stated_answer, stated_confidence, semantic_entropy
from tirlab.envs.math_tasks import boxed
from tirlab.rewards.outcome import (answer_reward, call_failed, final_text, format_reward, format_rewards, function_reward, math_equal, math_reward,
                            sum_turn_rewards, same_prompt, tool_rewards, tool_success_reward, torl_reward, turn_rewards)
from tirlab.rewards.shaping import (clip_rewards, delta_rewards, embed_code, message_code, sentence_embedder, shaped_answer_reward, shaped_outcomes,
                            written_code)
from tirlab.envs.tasks import ENVIRONMENTS
from tirlab.core.trajectory import StopReason, ToolCall, ToolError, ToolResult, Trajectory, Turn, TurnKind

nan = math.nan
few = settings(max_examples=50, deadline=None)


def says(text): return {"role": "assistant", "content": text}
def calling(arguments): return says("") | {"tool_calls": [{"type": "function", "function": {"name": "python", "arguments": arguments}}]}
def asks(code): return calling({"code": code})
def answers(text): return {"role": "tool", "name": "python", "content": text}
def turn(kind, *calls, results=()): return Turn([0], {}, kind, list(calls), list(results))


def same(a, b):
    "Equal lists, nan included."
    return torch.equal(torch.nan_to_num(torch.as_tensor(a), 9.0), torch.nan_to_num(torch.as_tensor(b), 9.0))


# ---- outcome

CONVERSATIONS = {                                            # text of the answer, exact, mathematical; the reference is 0.5
    "asks, then right": ([asks("1/2"), answers("0.5"), says("0.5")], 1, 1),
    "right in another spelling": ([says(r"\boxed{\frac{1}{2}}")], 0, 1),
    "right only in the first message": ([says("0.5"), says("7")], 0, 0),
    "right only in a tool's answer": ([asks("1/2"), answers("0.5")], 0, 0),
    "right, but asks once more": ([asks("1/2") | {"content": "0.5"}], 0, 0),
    "the number in prose": ([says("I tried 0.5 and 7")], 0, 0),
    "the last box counts": ([says(r"\boxed{7}, no, \boxed{0.5}")], 1, 1),
    "the first box does not": ([says(r"\boxed{0.5}, no, \boxed{7}")], 0, 0),
    "a box left open": ([says(r"\boxed{0.5")], 0, 0),
    "empty": ([says("")], 0, 0),
    "no content": ([says(None)], 0, 0),
    "nothing at all": ([], 0, 0),
    "very long": ([says("5" * 5000)], 0, 0),
    "not mathematics": ([says("}{\\frac{")], 0, 0),
}


@pytest.mark.parametrize("completion, exact, mathematical", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_outcome(completion, exact, mathematical):
    assert answer_reward([completion], ["0.5"]) == [exact] and math_reward([completion], ["0.5"]) == [mathematical]


@pytest.mark.parametrize("text, answer, want", [
    ("1/2", "0.5", True), ("$\\frac12$", "0.5", True), ("1,234", "1234", True), ("2\\sqrt{3}", "\\sqrt{12}", True), ("(2,3]", "(2,3]", True),
    ("x=3", "3", True), ("{1,2}", "{2,1}", True), ("50\\%", "0.5", True), ("0.5", "$\\frac{1}{2}$", True), ("1/3", "0.333", False),
    ("(2,3)", "(2,3]", False), ("-3", "3", False), ("0.5, 7", "0.5", False), ("0.5 or 7", "0.5", False), ("7} \\boxed{0.5", "0.5", False),
])
def test_mathematically_equal(text, answer, want):
    assert math_equal(text, answer) is want


def test_boxes():
    assert boxed(r"\boxed{a{b}{c{d}}} e") == "a{b}{c{d}}" and boxed("no box") is None and boxed(r"\boxed{}") == "" and boxed(r"\boxed{{}") is None


def test_a_runaway_comparison_ends_in_any_thread():
    "math-verify's own limit is an alarm signal, which another thread never gets."
    said = []
    def work(): said.extend([math_equal("9^{9^{9^{9}}}", "5", seconds=0.5), math_equal("10/2", "5", seconds=20)])
    thread = threading.Thread(target=work, daemon=True)
    start = time.monotonic()
    thread.start(), thread.join(60)
    assert said == [False, True] and time.monotonic() - start < 60


def test_a_judge_that_dies_is_replaced():
    assert math_equal("10/2", "5", seconds=20)
    os.kill(rewards_room._judge.pid, signal.SIGKILL)
    rewards_room._judge.wait()
    assert math_equal("10/2", "5", seconds=20)


# ---- turns

CALL = ToolCall("python", {"code": "1/0"})
GOOD, BAD = ToolResult("python", "0.5"), ToolResult("python", "ZeroDivisionError: division by zero")
RAISED = ToolResult("book", "{'error': 'full'}", ToolError.EXCEPTION)
BROKEN = ToolResult("tool_call", "{'error': 'malformed tool call'}", ToolError.MALFORMED)


@pytest.mark.parametrize("turns, form, tools", [
    ([], [], []),
    ([turn(TurnKind.RESPONSE)], [-0.1], [0]),
    ([turn(TurnKind.TOOL_CALL, CALL, results=[GOOD]), turn(TurnKind.RESPONSE)], [0, 0], [1, 0]),
    ([turn(TurnKind.TEXT_POLLUTION, results=[BROKEN]), turn(TurnKind.TOOL_CALL, CALL, results=[GOOD])], [-0.1, 0], [0, 1]),   # once, for two rules
    ([turn(TurnKind.TOOL_CALL, CALL, CALL, results=[GOOD, BAD]), turn(TurnKind.COLLAPSED)], [0, -0.1], [0.5, 0]),
    ([turn(TurnKind.TOOL_CALL, CALL, results=[RAISED])], [0], [0]),
])
def test_turns_by_hand(turns, form, tools):
    t = Trajectory([0], turns, StopReason.ANSWER)
    assert format_rewards(t) == form and tool_rewards(t, bonus=1.0) == tools
    assert sum_turn_rewards(t, [format_rewards, tool_rewards]) == pytest.approx([f + 0.1 * x for f, x in zip(form, tools)])
    assert sum_turn_rewards(t, []) == [0] * len(turns)


def test_outcome_goes_to_the_last_turn_that_happened():
    table = turn_rewards([[-0.1, 0.0, 0.0], [0.5], [0.0, 0.0], []], torch.tensor([1.0, 2.0, nan, 1.0]))
    assert same(table, torch.tensor([[-0.1, 0.0, 1.0], [2.5, nan, nan], [nan] * 3, [nan] * 3]))
    assert turn_rewards([[], []], torch.tensor([1.0, 0.0])).shape == (2, 0) and turn_rewards([], torch.empty(0)).shape == (0, 0)


@few
@given(rows=st.lists(st.tuples(st.lists(st.sampled_from([-0.5, 0.0, 0.25]), max_size=4), st.sampled_from([0.0, 1.0, nan])), max_size=6))
def test_the_table_is_what_loops_say(rows):
    table = turn_rewards([r for r, _ in rows], torch.tensor([o for _, o in rows]))
    for got, (row, outcome) in zip(table.tolist(), rows):
        want = row[:-1] + [row[-1] + outcome] if row else []
        want = [nan] * len(row) if math.isnan(outcome) else want
        assert same(got, want + [nan] * (len(got) - len(row)))


FAILS = ["{'error': 'full, use 7'}", "ZeroDivisionError: division by zero", "1\n2\nNameError: name 'x' is not defined", "SystemExit: 3",
         "json.decoder.JSONDecodeError: Extra data", "TimeoutError: still running after 1 seconds", "KeyboardInterrupt",
         "MemoryError: the limit is 512 MB"]


def test_which_answers_report_a_failure():
    assert all(map(call_failed, FAILS))
    assert not any(map(call_failed, ["", "0.5", "no Error at all", "Errors: 3", "{'errors': 0}", "x Exception: y"]))


def test_messages_by_hand():
    clean, once = [asks("1/2"), answers("0.5"), says("0.5")], [asks("1/0"), answers(FAILS[1]), asks("1/2"), answers("0.5"), says("1/2")]
    broken, guess = [says('<tool_call>{"na'), answers("{'error': 'malformed tool call'}"), says("7")], [says("0.5")]
    batch, reference = [clean, once, broken, guess, []], ["0.5"] * 5    # the third wrote no call that could be run
    assert format_reward(batch) == [0, 0, -0.1, -0.1, 0] and tool_success_reward(batch) == [1, 0.5, 0, 0, 0]
    assert torl_reward(batch, reference) == [1, 0.5, -1.5, 1, -1]
    assert final_text(clean) == "0.5" and final_text(clean[:2]) is None and final_text([]) is None
    call = lambda code: json.dumps({"name": "python", "arguments": {"code": code}})
    assert function_reward(batch, [[call("1/2")], [call("1/2"), call("2")], [call("1/2")], [], [call("1/2")]]) == [1, 0.5, 0, 0, 0]
    assert function_reward([[asks("1"), asks("1")], [asks("1")]], [[call("1")] * 3, [call("1")] * 2]) == [2 / 3, 0.5]     # each counts once


# ---- shaping; algorithms.md §5, trap 2

def one_hot(codes):
    "An embedding to calculate with: a comma-separated vector."
    return torch.tensor([[float(x) for x in c.split(",")] for c in codes])


def test_shaping_by_hand():
    "Cosines of the third with the two that passed: 1 and 0, of the fourth 0.8 and -0.6, which counts 0; the mean of both, halved."
    outcome = torch.tensor([1.0, 1.0, 0.0, 0.0, nan])
    assert shaped_outcomes(outcome, ["2,0", "0,5", "1,0", "4,-3", "1,0"], 5, one_hot).nan_to_num(9).tolist() == pytest.approx([1, 1, 0.25, 0.2, 9])


def test_shaping_divides_once_by_the_number_that_passed():
    "A copy of what passed earns alpha, however many passed."
    for n in (1, 2, 5): assert shaped_outcomes(torch.tensor([1.0] * n + [0.0]), ["x = 1"] * (n + 1), n + 1)[-1].item() == pytest.approx(0.5)


@few
@given(data=st.data(), size=st.integers(1, 5), groups=st.integers(1, 3), alpha=st.sampled_from([0.0, 0.5, 0.99]))
def test_shaped_failures_stay_below_alpha_and_loops_agree(data, size, groups, alpha):
    n = size * groups
    outcome = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, nan]), min_size=n, max_size=n)))
    code = data.draw(st.lists(st.sampled_from(["", "x = 1", "x = 2", "print(x)", "def f(a): return a", "\x00é"]), min_size=n, max_size=n))
    got, unit = shaped_outcomes(outcome, code, size, alpha=alpha), torch.nn.functional.normalize(embed_code(code))
    for i in range(n):
        group = range(i // size * size, i // size * size + size)
        likeness = [max((unit[i] @ unit[p]).item(), 0.0) for p in group if outcome[p] == 1]
        want = outcome[i].item() if outcome[i] != 0 else alpha * sum(likeness) / len(likeness) if likeness else 0.0
        assert same(got[i].isnan(), outcome[i].isnan()) and (math.isnan(want) or got[i].item() == pytest.approx(want, abs=1e-6))
        if outcome[i] == 0: assert 0 <= got[i] <= alpha < 1
    order = torch.tensor(data.draw(st.permutations(range(size))))
    again = shaped_outcomes(outcome[:size][order], [code[i] for i in order], size, alpha=alpha)
    assert torch.allclose(again, got[:size][order], equal_nan=True, atol=1e-6)


def test_the_embedding_is_asked_about_mixed_groups_only():
    asked = []
    def embed(codes): asked.extend(codes); return embed_code(codes)
    shaped_outcomes(torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, nan, 0.0]), list("abcdefgh"), 2, embed)
    assert asked == ["e", "f"]


@pytest.mark.parametrize("outcome, options, said", [
    ([1.0, 0.5], {}, "Shaping fills the space between a wrong answer, 0, and a right one, 1; give outcomes of 0, 1 or nan."),
    ([1.0, 0.0], dict(alpha=1.0), "alpha=1.0 would let a wrong answer earn as much as a right one; give 0 or more and less than 1."),
    ([1.0, 0.0, 0.0], {}, "3 rollouts do not make whole groups of 2."),
])
def test_shaping_refuses_in_one_sentence(outcome, options, said):
    with pytest.raises(ValueError) as error: shaped_outcomes(torch.tensor(outcome), ["x"] * len(outcome), 2, **options)
    assert str(error.value) == said


def test_the_embedding_is_the_same_in_every_process():
    "In a process that was not forked, for those share the seed of `hash`."
    code = """import json; from tirlab.rewards.shaping import embed_code; print(json.dumps([embed_code(["def f(x): return x + 1"]).nonzero()[:, 1].tolist(), hash("x")]))"""
    there, hashed = json.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    assert hashed != hash("x") and there == embed_code(["def f(x): return x + 1"]).nonzero()[:, 1].tolist()


def test_unlike_programs_are_unlike():
    words = [" ".join(f"name_{i}_{j}" for j in range(60)) for i in range(2)]
    a, b = torch.nn.functional.normalize(embed_code([f"alpha({words[0]})", "print(3 * 4)"]))
    assert abs(a @ b) < 0.1 and a @ a == pytest.approx(1)


def test_code_of_all_turns_in_order():
    calls = [ToolCall("python", {"code": "x = 1"}), ToolCall("book", {"name": "rab", "day": 7}), ToolCall("python", {"code": 3})]
    t = Trajectory([0], [turn(TurnKind.TOOL_CALL, *calls[:2]), turn(TurnKind.TOOL_CALL, calls[2])], StopReason.ANSWER)
    assert written_code(t) == "x = 1\nbook(name='rab', day=7)\npython(code=3)"
    assert message_code([asks("x = 1"), answers("y"), says("z"), asks("x = 2")]) == "x = 1\nx = 2" and message_code([]) == ""
    assert message_code([calling('{"code": "1"}')]) == '{"code": "1"}'     # arguments still as text


def test_sentence_transformers_are_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"): sentence_embedder("any")
    model = types.SimpleNamespace(encode=lambda texts, convert_to_tensor: torch.tensor([[len(t), 1.0] for t in texts]))
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=lambda name, **kwargs: model))
    assert shaped_outcomes(torch.tensor([1.0, 0.0]), ["aa", "bb"], 2, sentence_embedder("any")).tolist() == pytest.approx([1.0, 0.5])


def test_shaped_answers_are_shaped_by_prompt_wherever_the_rows_stand():
    batch = [[asks("x = 1"), answers(""), says(a)] for a in ("1", "2", "1", "2")]
    assert shaped_answer_reward(batch, ["p", "p", "q", "r"], ["1", "1", "1", "1"]) == pytest.approx([1, 0.5, 1, 0])
    apart, prompts = [batch[i] for i in (1, 2, 3, 0)], [[says(p)] for p in "pqrp"]
    assert shaped_answer_reward(apart, prompts, ["1"] * 4) == pytest.approx([0.5, 1, 0, 1])
    assert same_prompt([[says("p")], "p", [says("p")]]) == [[0, 2], [1]]


# ---- process rewards

def test_clip_and_delta_by_hand():
    steps = torch.tensor([[0.5, 0.75, 1.0, 0.25], [0.5, 0.25, nan, nan], [0.5, nan, nan, nan], [nan] * 4])
    assert same(clip_rewards(steps, 0.5), torch.tensor([[0, 0, 0, -0.25], [0, -0.25, nan, nan], [0, nan, nan, nan], [nan] * 4]))
    assert same(delta_rewards(steps), torch.tensor([[-0.25, -0.25, 1.0, 0], [0.5, 0, nan, nan], [0, nan, nan, nan], [nan] * 4]))


@few
@given(rows=st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=5), min_size=1, max_size=4))
def test_delta_is_what_loops_say_and_repeating_a_step_pays_nothing(rows):
    width = max(map(len, rows)) + 1
    padded = lambda row: row + [nan] * (width - len(row))
    got = delta_rewards(torch.tensor([padded(r) for r in rows]))
    for change, r in zip(got, rows):
        want = [r[k] - r[k + 1] if k < len(r) - 2 else r[k] if k == len(r) - 2 else 0.0 for k in range(len(r))]
        assert same(change, padded(want)) and change.nansum() == (r[0] if len(r) > 1 else 0)
        if r: assert delta_rewards(torch.tensor([padded(r[:1] + r)])).nansum() == r[0]
    clipped = clip_rewards(torch.tensor([padded(r) for r in rows]), 0.5)
    assert clipped.nan_to_num().le(0).all()


# ---- confidence and agreement

def test_calibration_by_hand():
    right, q = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, nan]), torch.tensor([1.0, 0.5, nan, 0.0, 0.5, nan, 0.5])
    assert same(calibrated(right, q), torch.tensor([1.0, 0.75, 0.0, 0.0, -0.25, -1.0, nan]))


@few
@given(p=st.integers(0, 20), q=st.integers(0, 20))
def test_honesty_pays_best_and_right_pays_more_than_wrong(p, q):
    p, q, ones = p / 20, torch.tensor([q / 20]), torch.ones(1)
    pays = lambda said: p * calibrated(ones, said) + (1 - p) * calibrated(0 * ones, said)
    assert pays(torch.tensor([p])) >= pays(q) - 1e-6 and calibrated(ones, q) >= calibrated(0 * ones, q)


@pytest.mark.parametrize("text, said, q", [
    ("<think>8</think><answer>7</answer><confidence>0.4</confidence>", "7", 0.4), (r"<answer>\boxed{7}</answer><confidence> 1 </confidence>", "7", 1),
    ("7", "7", nan), ("7<confidence>95%</confidence>", "7", nan), ("7<confidence>1.5</confidence>", "7", nan),
    ("7<confidence>-0</confidence>", "7", 0),
    ("<confidence>nan</confidence>", "", nan), ("<confidence>0.1</confidence>7<confidence>0.2</confidence>", "7", 0.2), ("", "", nan),
])
def test_what_was_said(text, said, q):
    assert stated_answer(text) == said and same(stated_confidence(text), q)


def test_rlcr_reads_the_last_message():
    text = "<answer>7</answer><confidence>0.5</confidence>"
    batch = [[says(text)], [asks("7"), answers("7"), says(text)], [says(text), asks("7")], []]
    assert rlcr_reward(batch, ["7", "8", "7", "7"]) == [0.75, -0.25, -1, -1]


def test_heaps_by_hand():
    heaps = clusters(["1/2", "0.5", None, "2", "3", "2.0"], math_equal)
    assert heaps == [0, 0, None, 1, 2, 1] and agreement(heaps) == pytest.approx([2 / 6, 2 / 6, 0, 2 / 6, 1 / 6, 2 / 6])
    assert semantic_entropy(heaps) == pytest.approx(-(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2)))
    assert clusters([]) == [] == agreement([]) and agreement([None, None]) == [0, 0] and semantic_entropy([None]) == 0 == semantic_entropy([0, 0])


@few
@given(answers=st.lists(st.sampled_from(["1", "1.0", "2", "x", None]), min_size=1, max_size=8), data=st.data())
def test_agreement_does_not_depend_on_order(answers, data):
    order = data.draw(st.permutations(range(len(answers))))
    shuffled = agreement(clusters([answers[i] for i in order]))
    assert shuffled == [agreement(clusters(answers))[i] for i in order] and all(0 <= r <= 1 for r in shuffled)


def test_agreement_is_by_prompt_and_needs_an_answer():
    batch = [[says("0.5")], [says("1/2")], [asks("x")], [says("<confidence>1</confidence>")], [says("0.5")]]
    assert agreement_reward(batch, ["p", "p", "p", "p", "q"]) == [0.5, 0.5, 0, 0, 1]


# ---- through the trainer

def test_all_reward_functions_through_the_trainer(tmp_path):
    functions = [answer_reward, math_reward, format_reward, tool_success_reward, torl_reward, function_reward, shaped_answer_reward, rlcr_reward,
                 agreement_reward]
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), per_device_train_batch_size=8, num_generations=4,
                     max_completion_length=128, max_steps=1, learning_rate=1e-4, save_strategy="no", disable_tqdm=True, seed=3)
    trainer = TIRTrainer(tiny_policy(), functions, args, make_tasks("all", n=4), environment_factory=ENVIRONMENTS)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "reward" in entry)
    means = {f.__name__: log[f"rewards/{f.__name__}/mean"] for f in functions}
    assert all(math.isfinite(m) for m in means.values())
    assert means["answer_reward"] <= min(means["math_reward"], means["shaped_answer_reward"]) <= 1 and means["format_reward"] <= 0
