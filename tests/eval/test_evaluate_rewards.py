"""Rewards mean the same in evaluation as in TRL's trainer: every kind of answer, environments, logs, weights; and what is no reward is one sentence."""
import asyncio
import functools
import math
import sqlite3
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tirlab.rollout.calls import RolloutLimits
from tirlab.envs.environments import PythonEnvironment
from tirlab.rollout.engines import GenerateEngine, Sampled, Sampling
from tirlab.eval.estimates import read_items, result_of, summary
from tirlab.eval.rewards import reward_sources, score_rows
from tirlab.eval.runs import Sampler, evaluate_run
from tirlab.eval.evaluate import Evaluation, evaluate
from tirlab.rewards.outcome import answer_reward
from tirlab.envs.tasks import ENVIRONMENTS, make_tasks
from tirlab.core.tiny import tiny_policy
from tirlab.traces.run import open_run
from tirlab.core.trajectory import StopReason, Trajectory, Turn, TurnKind

TASKS = make_tasks("arithmetic", "test", 4)
TOK = AutoTokenizer.from_pretrained(tiny_policy())


@functools.cache
def policy(): return AutoModelForCausalLM.from_pretrained(tiny_policy()).eval()


@pytest.fixture
def model(): return policy()


def said(text, ids=(5, 6)): return Trajectory([1, 2], [Turn(list(ids), {"role": "assistant", "content": text}, TurnKind.RESPONSE)], StopReason.ANSWER)


class Plain:
    "An environment without a reward."
    def __init__(self): self.total = 0.0
    def reset(self, **row): self.total = 0.0
    def add(self, n: int) -> str:
        """
        Add.

        Args:
            n: How much.
        """
        self.total += n
        return str(self.total)


class Owns(Plain):
    def get_reward(self): return self.total

class OwnsLater(Plain):
    async def get_reward(self): await asyncio.sleep(0); return self.total / 2

class OwnsSometimes(Plain):
    def get_reward(self): return None if self.total > 5 else self.total


ROWS = [dict(prompt=[{"role": "user", "content": f"{i}?"}], answer=a, environment="x") for i, a in enumerate(["1", "2", "3", "4"])]
DONE = [said(t) for t in ("1", "two", "3", "4")]


def constant(values):
    def reward(completions, **kwargs): return values
    return reward
async def later(completions, answer, **kwargs): await asyncio.sleep(0); return [float(c[-1]["content"] == a) for c, a in zip(completions, answer)]
class Callable:
    def __call__(self, completions, **kwargs): return [len(c[-1]["content"]) for c in completions]
class CallableLater:
    async def __call__(self, completions, **kwargs): return [0.25] * len(completions)
def of_worlds(environments, **kwargs): return [e.total for e in environments]
def of_everything(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
    assert prompts[0] == ROWS[0]["prompt"] and completion_ids[0] == [5, 6] and "environment" in kwargs
    log_extra("length", [len(i) for i in completion_ids]); log_metric("n", len(prompts)); log_metric("n", 0)
    return [trainer_state.global_step * 0.1] * len(prompts)

KINDS = {
    "floats": constant([0.1, 0.2, 0.3, 1.0]), "integers": constant([0, 1, 2, 3]), "booleans": constant([True, False, True, True]), "none": constant([None, 1.0, None, 0.0]),
    "nan": constant([math.nan, 1.0, float("nan"), 0.0]), "infinite": constant([-math.inf, math.inf, 0.0, 1.0]), "numpy booleans": constant([np.bool_(True), np.bool_(False), np.bool_(True), np.bool_(True)]),
    "numpy array": constant(np.array([0.1, np.nan, 2, 3])), "numpy numbers": constant([np.float64(0.7), np.int32(2), np.float16(0.1), np.uint8(1)]),
    "tensor": constant(torch.tensor([0.1, 0.2, torch.nan, 1])), "tensors": constant([torch.tensor(1.0), torch.tensor(True), torch.tensor(2), torch.tensor(torch.nan)]), "half tensor": constant(torch.tensor([0.1, 1, 2, 3], dtype=torch.bfloat16)),
    "tuple": constant((1.0, 0.0, 1.0, 0.5)), "mixed": constant([None, True, torch.tensor(0.5), np.float32(0.1)]), "coroutine": later, "object": Callable(), "object that waits": CallableLater(),
    "partial": functools.partial(constant([1.0, 0.0, 0.0, 0.0])), "built in": answer_reward, "of environments": of_worlds, "of everything": of_everything,
}


def worlds(kinds):
    out = [k() for k in kinds]
    for e, total in zip(out, (9.0, 1.0, 0.5, 3.0)): e.total = total
    return out


def trl(functions, environments, factory, weights, tmp_path):
    "TRL's own rewards: by function, total, extra columns and metrics."
    args = GRPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, reward_weights=weights, per_device_train_batch_size=4, num_generations=4)
    trainer = GRPOTrainer(policy(), list(functions), args, Dataset.from_list(ROWS), processing_class=TOK, environment_factory=factory)   # never trained
    trainer.environments, trainer.state.global_step, trainer.state.max_steps = environments, 1, 1
    table = trainer._calculate_rewards(ROWS, [r["prompt"] for r in ROWS], [t.messages for t in DONE], [t.completion_ids for t in DONE])
    total = (table * trainer.reward_weights).nansum(1)
    total[table.isnan().all(1)] = torch.nan   # as `_generate_and_score_completions` does
    return dict(zip(trainer.reward_func_names, table.T)), total, dict(trainer._pending_extra_logs), dict(trainer._pending_metrics)


def same(ours, theirs):
    assert torch.equal(torch.tensor([math.nan if x is None else x for x in ours]).nan_to_num(-7), theirs.nan_to_num(-7))


CASES = [*(([KINDS[name]], [Plain], None) for name in KINDS), ([KINDS["of everything"]], None, None), ([], [Owns], None), ([], [OwnsLater], None), ([], [OwnsSometimes], None), ([later, KINDS["none"]], None, [0.5, 2.0]),
         ([KINDS["none"], of_worlds], [Owns], [0.3, 0.7]), ([KINDS["nan"]], [OwnsSometimes], None), ([], [Owns, Plain, OwnsLater, Owns], None)]


@pytest.mark.parametrize("functions,kinds,weights", CASES, ids=[*KINDS, "no environment", "owned", "owned and waits", "owned with None", "weights", "weights and owned", "NaN and owned", "several classes"])
def test_every_kind_of_reward_is_what_trl_makes_of_it(functions, kinds, weights, tmp_path):
    environments = kinds and worlds(kinds * (4 // len(kinds)))
    factory = None if kinds is None else kinds[0] if len(kinds) == 1 else {i: k for i, k in enumerate(dict.fromkeys(kinds))}
    by_name, total, extra, metrics = trl(functions, environments, factory, weights, tmp_path)
    found = score_rows(ROWS, DONE, functions or None, weights, environments)
    same(found.rewards, total)
    assert list(found.by_function) == list(by_name) and found.extra == extra and found.metrics == metrics
    for name, column in by_name.items(): same(found.by_function[name], column)


def test_numbers_read_as_they_were_written():
    assert score_rows(ROWS, DONE, constant([0.1, 0.9, 1, None])).rewards == [0.1, 0.9, 1.0, None]


@pytest.mark.parametrize("answer,says", [
    (None, "returned None"), (3.5, "returned a float"), ([1.0], "returned 1 rewards"), ([1.0] * 5, "returned 5 rewards"), ("good", "returned a str"), (["1", "0", "1", "1"], "returned '1', a str"),
    ([1.0, [1.0], 0, 0], r"returned '\[1.0\]', a list"), ([1j, 0, 0, 0], "fit into float32"), ({"a": 1}, "returned a dict"), ([10**400, 0, 0, 0], "fit into float32"),
])
def test_what_is_no_reward_is_one_sentence_that_names_the_function(answer, says):
    with pytest.raises(ValueError, match=says) as e: score_rows(ROWS, DONE, constant(answer))
    assert "reward function 'reward'" in str(e.value) and "\n" not in str(e.value)


def test_reward_models_and_missing_sources_are_refused():
    for bad in ("org/model", [answer_reward, "org/model"], torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="is a reward model"): reward_sources(bad)
    with pytest.raises(ValueError, match="nothing to score with"): reward_sources([])
    with pytest.raises(ValueError, match="cannot be called"): reward_sources([3])
    with pytest.raises(ValueError, match="2 numbers for 1 reward function"): score_rows(ROWS, DONE, answer_reward, [1, 2])


def test_two_functions_of_one_name_are_both_there():
    found = score_rows(ROWS, DONE, [constant([1, 0, 0, 0]), constant([0, 1, 0, 0])])
    assert found.by_function == {"reward": [1, 0, 0, 0], "reward again": [0, 1, 0, 0]} and found.rewards == [1, 1, 0, 0]


def test_failed_rollouts_have_no_reward_and_are_not_shown():
    seen = []
    def counts(completions, log_extra, **kwargs):
        seen.append(len(completions)); log_extra("text", [c[-1]["content"] for c in completions])
        return [1.0] * len(completions)
    found = score_rows(ROWS, [DONE[0], Trajectory([1], [], StopReason.FAILED, "gone"), *DONE[2:]], counts)
    assert found.rewards == [1.0, None, 1.0, 1.0] and seen == [3] and found.extra == {"text": ["1", None, "3", "4"]}


def test_none_and_nan_are_alike_in_results_and_estimates():
    a, b = (Evaluation([], [1.0, x, 0.0, 1.0], 2) for x in (None, math.nan))
    assert a.rewards == b.rewards == [1.0, None, 0.0, 1.0] and a.success == b.success == 0.5 and str(a.estimates()) == str(b.estimates())
    assert str(summary([[1.0, math.nan]], answers=[["1", "2"]])) == str(summary([[1.0, None]], answers=[["1", "2"]])) and summary([[1.0, math.nan]])["avg@2"].mean == 1


# The same through `evaluate` and `evaluate_run`

class Says:
    "An engine that answers from a list of texts, the first for the first row; or by a function of the text so far."
    def __init__(self, texts): self.texts = texts if callable(texts) else list(texts)
    def ready(self, version=0): return GenerateEngine(torch.nn.Linear(1, 1), TOK, False).ready()
    async def generate(self, ids, sampling): return Sampled(TOK.encode(self.texts(TOK.decode(ids)) if callable(self.texts) else self.texts.pop(0), add_special_tokens=False) + [TOK.eos_token_id], None, "end")


CALL = '<tool_call>\n{"name": "add", "arguments": {"n": 3}}\n</tool_call>'
QUESTIONS = Dataset.from_list([{"prompt": [{"role": "user", "content": "Add."}], "answer": "3.0"}] * 2)
WAYS = ("evaluate", "evaluate_run")


def both(way, rows, texts, factory, reward, tmp_path, **more):
    "Rewards, extra columns and metrics by either way."
    if way == "evaluate":
        found = evaluate(None, TOK, rows, factory, reward, engine=Says(texts), **more)
        return found.rewards, found.extra, found.metrics
    result = evaluate_run(tmp_path / "run", {"chat": (rows, None)}, Sampler(Says(texts), TOK, environment_factory=factory), reward, **more)
    items = [line for _, line in sorted(read_items(tmp_path / "run").items())]
    column = lambda name: {name: [v for line in items for v in line["extra"][name]]} if all("extra" in line for line in items) else {}
    return [r for line in items for r in line["rewards"]], column("total"), result["cells"]["chat"]["metrics"]


@pytest.mark.parametrize("way", WAYS)
def test_environments_logs_and_owned_rewards_arrive(way, tmp_path):
    def reads(environments, log_extra, log_metric, **kwargs):
        log_extra("total", [e.total for e in environments]); log_metric("mean", sum(e.total for e in environments) / len(environments))
        return [e.total for e in environments]
    rewards, extra, metrics = both(way, QUESTIONS, [CALL, CALL, "done", "done"], Owns, [reads, later], tmp_path, reward_weights=[1.0, 10.0])
    assert rewards == [6.0, 6.0] and extra == {"total": [3.0, 3.0]} and metrics == {"mean": 3.0}
    assert both(way, QUESTIONS, ["3.0", "4"], Plain, None, tmp_path / "b")[0] == [1.0, 0.0]   # without a reward of its own: the answer counts
    assert both(way, QUESTIONS, [CALL, CALL, "no", "no"], Owns, None, tmp_path / "c")[0] == [3.0, 3.0]


def test_an_evaluation_keeps_what_each_function_said(tmp_path):
    found = evaluate(None, TOK, QUESTIONS, Owns, [later, answer_reward], engine=Says(["3.0", "4"]))
    assert found.by_function == {"later": [1.0, 0.0], "answer_reward": [1.0, 0.0], "Owns": [0.0, 0.0]} and found.rewards == [2.0, 0.0]
    evaluate_run(tmp_path, {"chat": (QUESTIONS, None)}, Sampler(Says(["3.0", "4"]), TOK, environment_factory=Owns), [later, answer_reward])
    run = open_run(tmp_path)
    assert dict(run.trajectory(run.index().id[0]).rewards) == {"later": 1.0, "answer_reward": 1.0, "Owns": 0.0} and result_of(tmp_path)["complete"]


class Bound(Plain):
    "An environment that belongs to the thread that made it."
    def __init__(self): self.db, self.thread = sqlite3.connect(":memory:"), threading.get_ident()
    def reset(self, **row): self.db.execute("create table if not exists t(n)"); self.db.execute("delete from t")
    def add(self, n: int) -> str:
        """
        Add.

        Args:
            n: How much.
        """
        self.db.execute("insert into t values (?)", (n,))
        return "ok"
    def get_reward(self): return float(self.db.execute("select sum(n) from t").fetchone()[0] or 0)


@pytest.mark.parametrize("schedule", ["turn", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_bound_to_a_thread_is_made_used_and_read_there(way, schedule, tmp_path):
    def reads(environments, **kwargs): return [float(e.db.execute("select count(*) from t").fetchone()[0]) for e in environments]
    def go(name): return both(way, QUESTIONS, lambda text: "done" if "<tool_response>" in text else CALL, Bound, reads, tmp_path / name, schedule=schedule)[0]
    async def notebook(): return go("b")
    assert go("a") == [4.0, 4.0] and asyncio.run(notebook()) == [4.0, 4.0]


@pytest.mark.parametrize("way", WAYS)
def test_coroutines_of_all_batches_share_an_event_loop(way, tmp_path):
    loops = []
    async def notes(completions, **kwargs): loops.append(asyncio.get_running_loop()); return [1.0] * len(completions)
    assert both(way, QUESTIONS, ["a", "b"], None, notes, tmp_path, batch_size=1)[0] == [1.0, 1.0] and len(loops) == 2 and loops[0] is loops[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_reward_may_run_a_loop_of_its_own(way, tmp_path):
    async def one(): return 1.0
    def runs(completions, **kwargs): return [asyncio.run(one()) for _ in completions]
    assert both(way, QUESTIONS, ["a", "b"], Plain, runs, tmp_path)[0] == [1.0, 1.0]


@pytest.mark.parametrize("way", WAYS)
def test_rewards_see_what_reset_said_as_in_training(way, tmp_path):
    class Asks(Plain):
        def reset(self, secret, **row): self.total = 0.0; return f" Guess {secret}."
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Play."}], "secret": 7}])
    seen = []
    def reads(prompts, **kwargs): seen.extend(prompts); return [1.0] * len(prompts)
    both(way, rows, ["7"], Asks, reads, tmp_path)
    both(way, rows.remove_columns("prompt"), ["7"], Asks, reads, tmp_path / "b")
    assert [p[-1]["content"] for p in seen] == ["Play. Guess 7.", " Guess 7."]


def test_infinite_rewards_do_not_make_a_run_unreadable(tmp_path):
    result = evaluate_run(tmp_path, {"chat": (QUESTIONS, None)}, Sampler(Says(["a", "b"]), TOK), constant([-math.inf]))
    assert result == result_of(tmp_path) and result["complete"] and result["cells"]["chat"]["estimates"]["avg@1"]["mean"] == 0
    assert read_items(tmp_path)["chat", 0]["rewards"] == [-math.inf] and open_run(tmp_path).status() == "finished"


def test_text_prompts_are_shown_as_text_as_in_training(model):
    rows, seen = Dataset.from_list([{"prompt": "Once upon a time"}]), []
    def reads(prompts, completions, **kwargs): seen.extend([*prompts, *completions]); return [1.0] * len(prompts)
    found = evaluate(model, TOK, rows, reward=reads, limits=RolloutLimits(8), sampling=Sampling(8))
    assert found.trajectories[0].prompt_ids == TOK("Once upon a time")["input_ids"] and seen[0] == "Once upon a time"
    assert seen[1] == TOK.decode(found.trajectories[0].completion_ids, skip_special_tokens=True)


def test_an_evaluation_of_the_policy_equals_trls_rewards_of_its_rollouts(model, tmp_path):
    found = evaluate(model, TOK, TASKS, PythonEnvironment, [answer_reward, KINDS["object"]], limits=RolloutLimits(96), reward_weights=[1.0, 0.01])
    args = GRPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=4, reward_weights=[1.0, 0.01])
    trainer = GRPOTrainer(model, [answer_reward, KINDS["object"]], args, TASKS, processing_class=TOK, environment_factory=PythonEnvironment)
    rows, trainer.environments = list(TASKS), [PythonEnvironment() for _ in TASKS]
    table = trainer._calculate_rewards(rows, [r["prompt"] for r in rows], [t.messages for t in found.trajectories], [t.completion_ids for t in found.trajectories])
    same(found.rewards, (table * trainer.reward_weights).nansum(1))
    assert set(ENVIRONMENTS) and any(found.rewards)
