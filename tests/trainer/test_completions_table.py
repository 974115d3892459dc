"""`log_completions=True`: whatever a model writes, or a reward logs, TRL's table is printed and written, and training goes on."""

import json
import math

import pandas as pd
import pytest
import torch
from small import small_policy
from trl import GRPOConfig, GRPOTrainer

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, make_tasks

SMALL = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=48, max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True, log_completions=True)
DEEP = []
for _ in range(5000): DEEP = [DEEP]


def call(arguments, name="python"): return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}, {"role": "tool", "name": name, "content": "1"}]
def said(text, **more): return [{"role": "assistant", "content": text} | more]


ODD = {"no arguments": call({}), "half an emoji": said("\ud83d and \ude00"), "half an emoji as an argument": call({"code": "print('\ud83d')"}), "a huge integer": call({"n": 2**70}),
       "an integer that cannot be printed": call({"n": 10**5000}), "a list": call([1, 2]), "text": call("1 + 1"), "JSON text": call('{"a": 1}'), "a number": call(4), "nothing": call(None),
       "not a number": call({"x": math.nan, "y": math.inf}), "other types": call({"code": 1}), "deeper": call({"code": {"a": [1, "b", None, {}]}}), "too deep": call({"a": DEEP}),
       "a name in halves": call({"a": 1}, "\udc00"), "no calls": said("4", tool_calls=None), "no text": said(None), "blocks": said([{"type": "text", "text": "4"}]), "thoughts": said("4", reasoning_content="2+2"),
       "numbers as text": said(4), "a null byte": said("\x00"), "text alone": "just \ud83d"}


def made(folder, reward=None, **options):
    args = TIRConfig(output_dir=str(folder), trace=False, **SMALL | options)
    return TIRTrainer(small_policy(), reward or (lambda completions, **kwargs: [0.0] * len(completions)), args, make_tasks("arithmetic", n=4), environment_factory=PythonEnvironment)


def fill(t, completions, **extra):
    n = len(completions)
    t._logs["prompt"].extend([[{"role": "user", "content": "2+2?"}]] * n)
    t._logs["completion"].extend(completions)
    t._logs["rewards"]["reward"].extend([0.5] * n)
    t._logs["advantages"].extend([0.1] * n)
    for name, values in extra.items(): t._logs["extra"][name].extend(values)


@pytest.fixture(scope="module")
def one(tmp_path_factory): return made(tmp_path_factory.mktemp("t"))


def table(t): return pd.read_parquet(f"{t.args.output_dir}/completions/completions_00000.parquet")


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_what_a_model_writes_is_printed_and_written(odd, one, capsys):
    "Beside an ordinary call, twice: the table of the next step may hold the same rows."
    for _ in range(2):
        fill(one, [odd, call({"code": "1+1"}) if isinstance(odd, list) else "4"])
        one.log({"loss": 0.0})
    frame = table(one)
    assert list(frame.columns) == ["step", "prompt", "completion", "reward", "advantage"] and "Completion" in capsys.readouterr().out
    ordinary = frame.completion.iloc[-1]
    if isinstance(odd, list): assert ordinary[0]["role"] == "assistant" and json.loads(ordinary[0]["tool_calls"][0]["function"]["arguments"]) == {"code": "1+1"} and ordinary[1]["content"] == "1"
    arguments = [json.loads(c["function"]["arguments"]) for m in frame.completion.iloc[0] if isinstance(m, dict) for c in (m.get("tool_calls") if m.get("tool_calls") is not None else [])]
    assert all(isinstance(a, dict) for a in arguments)
    one._logs["prompt"].clear(), one._logs["completion"].clear(), one._logs["advantages"].clear(), one._logs["rewards"].clear()


EXTRA = {"mixed": ([1, "a", None, 2.5], ["1", "a", None, "2.5"]), "numbers": ([1, 2.5, None, 3], [1, 2.5, None, 3]), "truth": ([True, None, False, True], [True, None, False, True]), "huge": ([2**70, 1, 2, 3], [str(2**70), "1", "2", "3"]),
         "empty": ([{}, {}, {}, {}], ["{}"] * 4), "lists": ([[1], ["a"], None, []], ["[1]", "['a']", None, "[]"]), "tensors": (list(torch.tensor([1.0, 2, 3, 4])), [1.0, 2, 3, 4]), "halves": (["\ud83d"] * 4, ["\ufffd"] * 4),
         "too few": (["a"], ["a", None, None, None])}


@pytest.mark.parametrize("given, written", EXTRA.values(), ids=EXTRA)
def test_columns_that_a_reward_logs(given, written, tmp_path, one):
    fill(one, [said("4")] * 4, extra=given)
    one.log({"loss": 0.0})
    found = table(one)["extra"].tolist()
    assert [None if w is None or w != w else w for w in found] == written
    for log in (*(one._logs[k] for k in ("prompt", "completion", "advantages")), one._logs["rewards"], one._logs["extra"]): log.clear()


def test_a_run_whose_reward_logs_a_mixture_and_whose_policy_calls_without_arguments(tmp_path, monkeypatch):
    def reward(completions, log_extra=None, **kwargs):
        log_extra("kind", [1, "a", None, {}])
        completions[0][:] = call({})[:1] + completions[0]
        return [0.0, 1.0] * 2
    t = made(tmp_path, reward)
    t.train()
    frames = [pd.read_parquet(tmp_path / f"completions/completions_0000{i}.parquet") for i in (1, 2)]
    assert all(f.kind.fillna("").tolist() == ["1", "a", "", "{}"] and len(f) == 4 for f in frames)


def test_trl_writes_the_same_table_where_it_can(tmp_path):
    "Names, columns, roles and contents of an ordinary table are TRL's."
    ours = made(tmp_path / "a")
    theirs = GRPOTrainer(small_policy(), lambda completions, **kwargs: [0.0] * len(completions), GRPOConfig(output_dir=str(tmp_path / "b"), use_cpu=True, bf16=False, **SMALL), make_tasks("arithmetic", n=4))
    theirs.reward_func_names = ours.reward_func_names
    for t in (ours, theirs):
        fill(t, [said("4"), said("5")])
        t.log({"loss": 0.0})
    a, b = table(ours), table(theirs)
    assert list(a.columns) == list(b.columns) and [list(map(dict, x)) for x in a.completion] == [list(map(dict, x)) for x in b.completion] and a.reward.tolist() == b.reward.tolist()
