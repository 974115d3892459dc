"""What comes of a tool's result: text for the model and the trace, TRL's object for rewards; one limit on its length; and environments that cannot be reset."""

import pickle
import re
import threading

import pytest
import two_lists
from datasets import concatenate_datasets
from forks import side_by_side
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, open_run, tiny_policy
from tirlab.rollout.calls import RolloutLimits
from tirlab.envs.environments import check_environment
from tirlab.eval.evaluate import evaluate
from tirlab.sandbox.executions import Limits
from tirlab.algorithms.prompts import Replay
from tirlab.rewards.outcome import tool_success_reward
from tirlab.rollout.loop import open_row
from tirlab.core.trajectory import StopReason, ToolResult, Trajectory, Turn, TurnKind

TOK = AutoTokenizer.from_pretrained(tiny_policy())
SMALL = dict(per_device_train_batch_size=8, num_generations=8, max_completion_length=160, max_steps=1, learning_rate=1e-4, save_strategy="no", disable_tqdm=True, seed=0)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(tiny_policy()).eval(), TOK


# ---- what rewards are handed


LOCK = threading.Lock()
VALUES = {"list": [1, {"a": 2}], "blocks": [{"type": "text", "text": "85"}], "empty list": [], "long list": [*range(40)], "not to be pickled": [LOCK], "dict": {"a": 1}, "tuple": (1, 2), "number": 85, "none": None, "text": "85"}


class Returns:
    "An environment whose tool returns what the row says."
    def reset(self, kind, **row): self._value = VALUES[kind]
    def python(self, code: str) -> list:
        """
        Answer.

        Args:
            code: Anything.
        """
        return self._value


def of_kinds(n=1):
    kinds = [*VALUES] * n
    return make_tasks("arithmetic", n=len(kinds)).add_column("kind", kinds)


def contents(completions, kind):
    "What the tools answered, as a reward function gets it: (kind of the row, content)."
    return [(k, m["content"]) for c, k in zip(completions, kind) for m in c if m["role"] == "tool" and "error" not in str(m["content"])[:10]]


def test_rewards_get_what_trl_gives_them(policy, tmp_path, monkeypatch):
    "A list is that list, the same object; all else is text. In TRL's trainer, in ours, and in `evaluate`; the trace holds text."
    suffix = GRPOTrainer._get_tool_suffix_ids   # the tiny policy's template joins text
    monkeypatch.setattr(GRPOTrainer, "_get_tool_suffix_ids", lambda self, messages: suffix(self, [m | {"content": str(m["content"])} for m in messages]))
    seen = []
    def reward(completions, kind, **kwargs):
        seen.extend(contents(completions, kind))
        return [0.0] * len(completions)
    def taken():
        found = list(seen)
        seen.clear()
        return found
    common = dict(output_dir=str(tmp_path), max_tool_calling_iterations=1, report_to="none", **SMALL | dict(per_device_train_batch_size=4 * len(VALUES), num_generations=4))
    GRPOTrainer(tiny_policy(), reward, GRPOConfig(use_cpu=True, bf16=False, gradient_checkpointing=False, **common), of_kinds(), environment_factory=Returns).train()
    theirs = taken()
    args = TIRConfig(run_dir=str(tmp_path / "run"), malformed_calls="stop", max_observation_chars=None, log_completions=True, **common)
    trainer = TIRTrainer(tiny_policy(), reward, args, of_kinds(), environment_factory=Returns)
    trainer.train()
    ours = taken()
    evaluate(*policy, of_kinds(2), Returns, reward, limits=RolloutLimits(160, observation_chars=None))
    for found in (theirs, ours, taken()):
        assert len({k for k, _ in found}) > len(VALUES) // 3 and any(isinstance(t, list) for _, t in found)
        for kind, told in found: assert told is VALUES[kind] if isinstance(VALUES[kind], list) else told == str(VALUES[kind])
    run = open_run(args.run_dir)
    told = ["".join(run.trajectory(i).text) for i in run.index().id]
    assert all(any(str(VALUES[k]) in text for text in told) for k, _ in ours)


def test_a_list_is_whole_where_its_text_was_cut(policy):
    seen, rows = [], of_kinds().filter(lambda r: r["kind"] == "long list")
    rows = concatenate_datasets([rows] * 8)
    found = evaluate(*policy, rows, Returns, lambda completions, kind, **k: seen.extend(contents(completions, kind)) or [0.0] * 8, limits=RolloutLimits(160, observation_chars=40))
    assert seen and all(told is VALUES["long list"] for _, told in seen)
    assert any(r.truncated and "left out" in r.content for t in found.trajectories for r in t.results)


def listed(value):
    return Trajectory([1], [Turn([2], {"role": "assistant", "content": ""}, TurnKind.TOOL_CALL, results=[ToolResult("tool", str(value), value=value)], observation_ids=[3])], StopReason.LENGTH)


def test_objects_stay_in_their_process_and_out_of_checkpoints():
    t, replay = listed([LOCK]), Replay()
    assert t.reward_messages[1]["content"] == [LOCK] and t.messages[1]["content"] == str([LOCK])
    assert pickle.loads(pickle.dumps(t)).reward_messages == t.messages and pickle.loads(pickle.dumps(t)) == t
    replay.add("task", t, 1.0)
    again = Replay()
    again.load_state_dict(replay.state_dict())
    assert again.kept["task"][0][0].messages == t.messages


def test_our_rewards_read_lists():
    assert tool_success_reward([listed([1, 2]).reward_messages, listed("x").reward_messages]) == [1.0, 1.0]


# ---- one limit


@pytest.mark.parametrize("code,size", [("print('x' * 1500)", 1500), ("print('x' * 50_000)", 50_000), ("raise ValueError('x' * 1500)", 1512)])
def test_what_the_model_reads_is_cut_in_one_place(code, size):
    "By `observation_chars`, with the number of characters that are missing; the sandbox keeps them all."
    import asyncio
    from tirlab.rollout.calls import run_call
    from tirlab.core.trajectory import ToolCall
    ask = lambda limit: asyncio.run(run_call(ToolCall("python", {"code": code}), {"python": PythonEnvironment().python}, RolloutLimits(observation_chars=limit)))
    whole, cut = ask(None), ask(100)
    assert len(whole.content) >= size and not whole.truncated and "left out" not in whole.content
    assert cut.truncated and f"... {len(whole.content) - 100} characters left out ..." in cut.content and ask(2048).truncated == (size > 2048)
    assert Limits().output_chars >= 100 * TIRConfig(output_dir="unused", report_to="none").max_observation_chars


# ---- reset


class Fussy:
    "An environment that refuses one row."
    def reset(self, answer, **row):
        if answer == "bad": raise ValueError("no such ware")
    def python(self, code: str) -> str:
        """
        Answer.

        Args:
            code: Anything.
        """
        return "85"


class Bare:
    def reset(self): pass


class Needs:
    def reset(self, ware, **row): pass


class Few:
    def reset(self, prompt): pass


def rows(n=8, bad=3):
    tasks = make_tasks("arithmetic", n=n)
    return tasks.remove_columns("answer").add_column("answer", ["bad" if i == bad else a for i, a in enumerate(tasks["answer"])])


def test_a_reset_that_raises_names_the_row_in_evaluation(policy):
    with pytest.raises(ValueError, match=r"^reset of Fussy failed on row 3 \(.+\): ValueError: no such ware$") as caught: evaluate(*policy, rows(), Fussy, k=2)
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="reset of Fussy failed on row 4"): evaluate(*policy, rows(bad=4), Fussy, batch_size=3)


@pytest.mark.parametrize("factory", [Fussy, lambda: Fussy(), {"arithmetic": Fussy}])
@pytest.mark.parametrize("options", [{}, dict(min_reward_std=0.001, oversample=1.0)])
def test_a_reset_that_raises_names_the_row_in_training(factory, options, tmp_path):
    data = rows(bad=0)
    asked = data[0]["prompt"][-1]["content"][:20]
    trainer = TIRTrainer(tiny_policy(), [answer_reward], TIRConfig(output_dir=str(tmp_path), trace=False, shuffle_dataset=False, **SMALL, **options),
                         data.map(lambda r: {"environment": "arithmetic"}) if isinstance(factory, dict) else data, environment_factory=factory)
    with pytest.raises(ValueError, match=rf"^reset of Fussy failed on row 0 \({re.escape(asked)}.*\): ValueError: no such ware$"): trainer.train()


def test_other_errors_of_training_are_left_alone(tmp_path):
    def reward(**kwargs): raise KeyError("my own")
    trainer = TIRTrainer(tiny_policy(), [reward], TIRConfig(output_dir=str(tmp_path), trace=False, **SMALL), make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment)
    with pytest.raises(KeyError, match="my own"): trainer.train()


@pytest.mark.parametrize("factory,said", [
    (Bare, "`reset` of Bare is called with the columns of a row"), (Needs, "missing a required argument: 'ware'"), (Few, "`reset` of Few"), (lambda: Bare(), "`reset` of Bare"),
    (Fussy(), "environment_factory is an instance of Fussy; give the class itself, environment_factory=Fussy"), (PythonEnvironment(), "instance of PythonEnvironment"),
    ("python", "instance of str"),
])
def test_environments_that_cannot_work_get_one_sentence(factory, said, policy):
    row = make_tasks("arithmetic", n=1)[0]
    for form, given in ((factory, row), ({"arithmetic": factory}, row | {"environment": "arithmetic"})):
        with pytest.raises(ValueError, match=re.escape(said)) as caught: open_row(given, TOK, form)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factory,said", [(Bare, "`reset` of Bare"), (Fussy(), "environment_factory=Fussy"), ({"a": Fussy()}, "environment_factory=Fussy")])
def test_the_trainer_says_so_before_it_begins(factory, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        TIRTrainer(tiny_policy(), [answer_reward], TIRConfig(output_dir=str(tmp_path / "out"), **SMALL), make_tasks("arithmetic", n=8), environment_factory=factory)
    assert not (tmp_path / "out").exists()


def test_environments_that_work_are_let_through():
    from functools import partial
    class Keeps:
        def __init__(self, word="a"): pass
        def reset(self, prompt=None, **row): pass
    class Shared:
        @classmethod
        def reset(cls, **row): pass
    for factory in (None, Keeps, Shared, partial(Keeps, "b"), lambda: Keeps(), {"a": Keeps, "b": Fussy}): check_environment(factory, ["prompt", "answer", "environment"])
    check_environment({"a": Bare}, ["environment"])   # TRL passes nothing on


def test_a_prompt_may_come_from_reset():
    "As in TRL, where a row without a `prompt` has an empty one, which `reset` fills."
    class Asks(Fussy):
        def reset(self, **row): return "How many?"
    prompt = open_row({"seed": 1}, TOK, Asks)[0]
    assert "How many?" in TOK.decode(prompt)
    with pytest.raises(ValueError, match="no `prompt`.*the columns are answer"): open_row({"answer": "1"}, TOK, Fussy)


@pytest.mark.slow
def test_lists_that_cannot_be_pickled_train_in_two_processes(tmp_path):
    said = tmp_path / "said"
    assert side_by_side(2, two_lists.main, str(tmp_path / "two"), said=said) == [0, 0], "".join(f.read_text()[-3000:] for f in tmp_path.glob("said*"))
