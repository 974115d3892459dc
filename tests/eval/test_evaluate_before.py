"""An evaluation that cannot work says so before the first rollout, in one sentence, and leaves no folder behind; what is passed on reaches the prompt."""
import json
import warnings
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from test_drift import ends_of, tokenizer
from test_evaluate_rewards import CALL, Owns, Plain, Says
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tirlab.cli import main as cli
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.engines import EngineError, GenerateEngine, Sampled
from tirlab.envs.environments import PythonEnvironment
from tirlab.eval.settings import eval_config, eval_folder, read_eval_settings
from tirlab.eval.runs import Sampler, evaluate_run
from tirlab.eval.evaluate import evaluate, evaluate_cells, restore
from tirlab.collapse.interventions import Clamp
from tirlab.core.formats import make_format
from tirlab.rewards.outcome import answer_reward
from tirlab.rollout.scripted import scripts, turn_ids
from tirlab.envs.tasks import ENVIRONMENTS, make_tasks
from tirlab.core.tiny import CHAT_TEMPLATE, tiny_policy
from tirlab.traces.run import open_run
from tirlab.core.trajectory import StopReason, TurnKind

TOK = AutoTokenizer.from_pretrained(tiny_policy())
ROWS = make_tasks("arithmetic", "test", 3)
GREETS = CHAT_TEMPLATE.replace(r"assistant\n' }}{% endif %}", r"assistant\n' }}{{ greeting or 'Well: ' }}{% endif %}")


@pytest.fixture(scope="module")
def policy(): return AutoModelForCausalLM.from_pretrained(tiny_policy()).eval(), TOK


class Untouched:
    "An engine that must not be asked."
    def ready(self, version=0): raise AssertionError("sampling was about to begin")


def no_more(completions): return [1.0] * len(completions)
def of_environments(completions, environments, **kwargs): return [1.0] * len(completions)
def of_a_column(completions, difficulty, **kwargs): return [1.0] * len(completions)
def untyped(x):
    "Do something."
class Raises(Plain):
    def reset(self, **row): raise KeyError("state")
class TakesNothing(Plain):
    def reset(self): pass
def bad_limits(**more): return dict(limits=RolloutLimits(**more))

REFUSED = {   # what is wrong -> arguments, and what is said
    "no rows": (dict(dataset=ROWS.select([])), "nothing to evaluate"), "no tries": (dict(k=0), "nothing to evaluate"), "no prompt": (dict(dataset=ROWS.rename_column("prompt", "question"), environment_factory=None), "has no column `prompt`"),
    "no prompt and a silent reset": (dict(dataset=ROWS.rename_column("prompt", "question")), "has no `prompt`"), "an answer is missing": (dict(dataset=Dataset.from_list([*ROWS, ROWS[0] | {"answer": None}])), "Task 3 has no answer"),
    "a column is missing": (dict(reward=of_a_column), "Task 0 has no difficulty"), "a reward without kwargs": (dict(reward=no_more), r"`no_more` cannot be called as TRL calls it .*take \*\*kwargs"),
    "no environments": (dict(reward=of_environments, environment_factory=None), "reads `environments`, and there are none"), "a reward model": (dict(reward="org/model"), "is a reward model"),
    "weights": (dict(reward=[answer_reward], reward_weights=[1, 2]), "2 numbers for 1 reward"), "an instance": (dict(environment_factory=PythonEnvironment()), "is an instance of PythonEnvironment"),
    "an unknown environment": (dict(environment_factory={"python": PythonEnvironment}), "must name one of python"), "reset raises": (dict(environment_factory=Raises), "reset of Raises failed on row 0"),
    "reset takes nothing": (dict(environment_factory=TakesNothing), "`reset` of TakesNothing is called with the columns"), "an untyped tool": (dict(tools=[untyped]), "untyped|type hint"), "a format": (dict(call_format="yaml"), "Unknown call format 'yaml'"),
    "a schedule": (dict(schedule="soon"), "schedule='soon' is unknown"), "a pattern": (bad_limits(answer_pattern="(" ), "no regular expression"), "malformed": (bad_limits(malformed="ignore"), "malformed='ignore' is unknown"),
    "void": (bad_limits(void="ignore"), "void='ignore' is unknown"), "a template": (dict(chat_template="{% if %}"), "chat_template is no Jinja template: .* \\(line 1\\)"), "one of several rewards": (dict(reward=[answer_reward, no_more]), "`no_more` cannot be called"),
}


@pytest.mark.parametrize("wrong", REFUSED)
@pytest.mark.parametrize("way", ["evaluate", "evaluate_cells", "evaluate_run"])
def test_what_cannot_work_is_refused_before_anything_is_sampled(way, wrong, tmp_path):
    changes, said = REFUSED[wrong]
    given = dict(dataset=ROWS, environment_factory=PythonEnvironment, reward=answer_reward) | changes
    rows, announced = given.pop("dataset"), []
    with pytest.raises(ValueError, match=said) as e:
        if way == "evaluate": evaluate(None, TOK, rows, engine=Untouched(), **given)
        elif way == "evaluate_cells": evaluate_cells(None, TOK, {"fine": ROWS, "test": rows}, [given.pop("call_format", None)], engine=Untouched(), **given)
        else:
            sampler = {name: given.pop(name) for name in ("environment_factory", "tools", "limits", "chat_template") if name in given}
            evaluate_run(tmp_path / "run", {"fine": (ROWS, None), "test": (rows, given.pop("call_format", None))}, Sampler(Untouched(), TOK, **sampler), begun=announced.append, **given)
    assert "\n" not in str(e.value) and not announced and not (tmp_path / "run").exists()


def test_an_engine_that_does_not_start_leaves_no_folder(tmp_path):
    with pytest.raises(AssertionError, match="about to begin"): evaluate_run(tmp_path / "run", {"chat": (ROWS, None)}, Sampler(Untouched(), TOK, environment_factory=PythonEnvironment))
    assert not (tmp_path / "run").exists()


def test_a_reward_may_leave_a_row_out_and_rows_may_be_a_list():
    def some(completions, answer, **kwargs): return [None if a is None else 1.0 for a in answer]
    found = evaluate(None, TOK, [ROWS[0], ROWS[1] | {"answer": None}], PythonEnvironment, some, engine=Says(["a", "b"]))
    assert found.rewards == [1.0, None]
    with pytest.raises(ValueError, match=r"splits, train, test; give one of them, such as dataset\['train'\]"): evaluate(None, TOK, DatasetDict(train=ROWS, test=ROWS), engine=Untouched())
    with pytest.raises(ValueError, match="IterableDataset cannot be evaluated"): evaluate(None, TOK, ROWS.to_iterable_dataset(), engine=Untouched())


# What is passed on

def begun(trajectory): return TOK.decode(trajectory.prompt_ids)


def test_a_template_and_its_variables_reach_the_prompt_by_every_way(policy, tmp_path):
    small, more = dict(limits=RolloutLimits(4)), dict(chat_template=GREETS, template_kwargs={"greeting": "Hey: "})
    assert begun(evaluate(*policy, ROWS, PythonEnvironment, **small).trajectories[0]).endswith("assistant\n")
    assert begun(evaluate(*policy, ROWS, PythonEnvironment, chat_template=GREETS, **small).trajectories[0]).endswith("Well: ")
    assert begun(evaluate(*policy, ROWS, PythonEnvironment, **small, **more).trajectories[0]).endswith("Hey: ")
    assert begun(restore(*policy, [Clamp("<tool_call>", "start", high=0)], ROWS, PythonEnvironment, **small, **more).trajectories[0]).endswith("Hey: ")
    cells = evaluate_cells(*policy, {"test": ROWS}, [None, "xml"], PythonEnvironment, **small, **more)
    assert all(begun(e.trajectories[0]).endswith("Hey: ") for e in cells.values())
    sampler = Sampler(Says(["1", "2", "3"]), TOK, environment_factory=PythonEnvironment, **more)
    evaluate_run(tmp_path, {"chat": (ROWS, None)}, sampler)
    assert "".join(open_run(tmp_path).trajectory("chat-00000-000").prompt_text).endswith("Hey: ") and "".join(GREETS.split()) not in (tmp_path / "meta.json").read_text()
    with pytest.raises(ValueError, match="was begun with template_kwargs"): evaluate_run(tmp_path, {"chat": (ROWS, None)}, Sampler(Says([]), TOK, environment_factory=PythonEnvironment, chat_template=GREETS))


def test_the_command_takes_a_template_as_file_or_text(tmp_path, capsys):
    (tmp_path / "mine.jinja").write_text(GREETS)
    words = ["eval", "tasks=arithmetic", "n=2", "max_completion_length=8", "chat_template_kwargs={greeting: 'Oh: '}"]
    for name, template in (("a", f"{tmp_path}/mine.jinja"), ("b", GREETS)):
        assert cli.main([*words, f"chat_template={template}", f"out={tmp_path}/{name}"]) == 0
        assert "".join(open_run(tmp_path / name).trajectory("chat-00000-000").prompt_text).endswith("Oh: ")
    assert cli.main([*words, f"chat_template={tmp_path}/mine.jinja", f"out={tmp_path}/b"]) == 0   # the same template: it goes on
    (tmp_path / "mine.jinja").write_text(GREETS.replace("Well", "So"))
    assert cli.main([*words, f"chat_template={tmp_path}/mine.jinja", f"out={tmp_path}/b"]) == 2 and "was begun with chat_template=" in capsys.readouterr().err


def test_settings_that_are_new_do_not_move_older_folders():
    settings = read_eval_settings([])
    assert not {"chat_template", "chat_template_kwargs", "last_turn_prompt"} & set(eval_config(settings)) and eval_folder(settings) != eval_folder(read_eval_settings(["chat_template={{ x }}"]))
    trained = read_eval_settings(["call_format=xml", "tool_timeout=3", "last_turn_prompt=Answer now."])
    assert trained.call_format == "xml" and trained.tool_timeout == 3.0 and trained.last_turn_prompt == "Answer now." and trained == read_eval_settings(["format=xml", "tool_seconds=3", "last_turn_prompt=Answer now."])
    assert eval_config(trained)["format"] == "xml" and eval_config(trained)["tool_seconds"] == 3.0 and not {"call_format", "tool_timeout", "recipe"} & set(eval_config(trained))


@pytest.mark.parametrize("words,said", [
    (["chat_template=nobody.jinja"], "chat_template=nobody.jinja is no file that can be read"), (["chat_template_kwargs=3"], "should be names with values"), (["chat_template={% if %}"], "chat_template is no Jinja template"),
    (["chat_template={{ 1 }}", "endpoint=http://127.0.0.1:9/v1", "model=m"], "server's own template"), (["malformed_calls=ignore"], "malformed='ignore' is unknown"), (["void_turns=ignore"], "void='ignore' is unknown"),
    (["answer_pattern=("], "no regular expression"), (["k=null"], "k=null means nothing"), (["model=run"], "not a checkpoint; give the checkpoint inside: model=checkpoint-"), (["model=."], "give the checkpoint inside: model=checkpoint-"), (["model=empty"], "holds no checkpoint"), (["out=notes"], "is not empty and holds no run"),
])
def test_the_command_refuses_in_one_sentence_and_announces_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for f in ("run/meta.json", "checkpoint-9/config.json", "checkpoint-10/config.json", "empty/x/notes.txt", "notes/x.txt"):
        (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f).write_text("{}")
    assert cli.main(["eval", "n=2", *words]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[-1].startswith("tirlab: ") and said in shown[-1] and not any("Run folder" in line for line in shown) and not list(tmp_path.glob("runs/*"))


def test_drift_check_takes_a_template_and_refuses_a_run_folder(tmp_path, monkeypatch, capsys):
    from tirlab.eval import demonstrate
    seen = []
    monkeypatch.setattr(demonstrate, "usable_format", lambda *args, chat_template: seen.append(chat_template) or SimpleNamespace(chat_template=chat_template))
    monkeypatch.setattr(demonstrate, "drift_check", lambda format: demonstrate.DriftReport([]))
    (tmp_path / "t.jinja").write_text("{{ x }}")
    assert cli.main(["drift-check", "--chat-template", f"{tmp_path}/t.jinja"]) == 0 and cli.main(["drift-check"]) == 0 and seen == ["{{ x }}", None]
    assert cli.main(["drift-check", "--chat-template", "no.jinja"]) == 2 and "no.jinja is no file that can be read" in capsys.readouterr().err
    (tmp_path / "meta.json").write_text("{}")
    assert cli.main(["drift-check", "--model", str(tmp_path)]) == 2 and "kept no checkpoint" in capsys.readouterr().err


# One meaning with training

def test_without_tools_a_turn_is_the_answer_as_in_training():
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Add."}], "answer": "1"}])
    (alone,) = evaluate(None, TOK, rows, engine=Says(["<tool_call> broken"])).trajectories
    (equipped,) = evaluate(None, TOK, rows, Plain, engine=Says(["<tool_call> broken", "1"])).trajectories
    assert len(alone.turns) == 1 and alone.turns[0].kind is TurnKind.TEXT_POLLUTION and len(equipped.turns) == 2


class Game:
    "Talks, and has no tool."
    def reset(self, secret, **row): self.secret, self.said = secret, []; return "Guess."
    def _reply(self, text):
        self.said.append(text)
        return None if text == self.secret else ("Wrong.", [])
    def get_reward(self): return 1.0 / len(self.said)


class OnlyReward:
    def reset(self, **row): pass
    def get_reward(self): return 0.5


class Lists(Plain):
    "Its tools are those of the task."
    def reset(self, names, **row): self.total, self.names = 0.0, names
    def _tools(self): return [getattr(self, n) for n in self.names]


@pytest.mark.parametrize("way", ["evaluate", "evaluate_run"])
@pytest.mark.parametrize("kind,row,texts,reward", [
    (Game, {"secret": "7"}, ["3", "7"], 0.5), (OnlyReward, {}, ["hm"], 0.5), (Lists, {"names": ["add"]}, [CALL, "3.0"], 1.0), ({"a": Owns, "b": Plain}, {"environment": "a"}, [CALL, "ok"], 3.0),
])
def test_environments_of_every_kind(way, kind, row, texts, reward, tmp_path):
    rows = Dataset.from_list([row | {"prompt": [{"role": "user", "content": "Hello."}], "answer": "3.0"}])
    if way == "evaluate": found = evaluate(None, TOK, rows, kind, engine=Says(texts)).rewards
    else: found = [open_run(evaluate_run(tmp_path, {"chat": (rows, None)}, Sampler(Says(texts), TOK, environment_factory=kind))["run_dir"]).index().reward.iloc[0]]
    assert found == [reward]


def test_the_context_of_the_model_ends_a_rollout(policy):
    long = Dataset.from_list([{"prompt": [{"role": "user", "content": "x" * 5000}], "answer": "1"}])
    found = evaluate(*policy, long, PythonEnvironment)
    assert found.trajectories[0].stop is StopReason.CONTEXT and found.rewards == [0.0]


class Fails(Plain):
    def add(self, n: int) -> str:
        """
        Add.

        Args:
            n: How much.
        """
        raise RuntimeError("the disk is on fire")


class Gone(Says):
    async def generate(self, ids, sampling): raise EngineError("the machine is gone")


@pytest.mark.parametrize("way", ["evaluate", "evaluate_run"])
def test_an_evaluation_in_which_everything_failed_says_so(way, tmp_path):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Add."}], "answer": "1"}] * 2)
    def run(engine, factory, name):
        if way == "evaluate": return evaluate(None, TOK, rows, factory, engine=engine)
        return evaluate_run(tmp_path / name, {"chat": (rows, None)}, Sampler(engine, TOK, environment_factory=factory))
    with pytest.warns(UserWarning, match="Every tool call failed, 2 of 2; the first: .*the disk is on fire"): run(Says([CALL, CALL, "1", "1"]), Fails, "a")
    with pytest.warns(UserWarning, match="Every rollout failed, 2 of 2; the first: the machine is gone"): run(Gone([]), Plain, "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Says([CALL, CALL, "1", "1"]), Plain, "c")


# A new user's folder

@pytest.mark.parametrize("pad", [True, False])
def test_a_saved_folder_is_evaluated_as_it_is(policy, pad, tmp_path):
    policy[0].save_pretrained(tmp_path)
    TOK.save_pretrained(tmp_path)
    if not pad: (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in json.loads((tmp_path / "tokenizer_config.json").read_text()).items() if k != "pad_token"}))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token is not None) == pad and isinstance(tokenizer, PreTrainedTokenizerFast)
    rows = make_tasks("arithmetic", "test", 8)
    assert evaluate(model, tokenizer, rows, PythonEnvironment).rewards == evaluate(*policy, rows, ENVIRONMENTS).rewards and (tokenizer.pad_token is not None) == pad


class Plays:
    "An engine that calls first, in the format's own markup, and then answers."
    def __init__(self, format): self.turns = [turn_ids(format, m) for m in scripts("")["one call"] if m["role"] == "assistant"]
    def ready(self, version=0): return GenerateEngine(SimpleNamespace(eval=lambda: None, train=lambda mode: None, training=False), TOK, False).ready()
    async def generate(self, ids, sampling): return Sampled(self.turns.pop(0), None, "end")


@pytest.mark.parametrize("call_format", [None, "xml"])
@pytest.mark.parametrize("family", "qwen2_5 qwen3 qwen3_5_nothink llama3_1 glm4moe gptoss gemma4 lfm2_v2 nemotron_3_nano".split())
def test_a_right_call_of_every_family_is_run_with_the_tokenizer_as_the_hub_has_it(family, call_format, tmp_path):
    tok = tokenizer(family)
    del tok.response_template   # only TRL's trainer installs it
    ends = tok.convert_tokens_to_ids(ends_of(family))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends), config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    format = make_format(call_format, tok, [PythonEnvironment().python], end_tokens=ends)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "37+48?"}], "answer": "85"}])
    (t,) = evaluate(model, tok, rows, PythonEnvironment, engine=Plays(format), call_format=call_format, limits=RolloutLimits(2048)).trajectories
    assert [k.kind for k in t.turns] == [TurnKind.TOOL_CALL, TurnKind.RESPONSE] and [r.content.strip() for r in t.results] == ["85"] and t.stop is StopReason.ANSWER
    sampler = Sampler(Plays(format), tok, ends, PythonEnvironment, limits=RolloutLimits(2048))
    index = open_run(evaluate_run(tmp_path, {"chat": (rows, call_format)}, sampler)["run_dir"]).index()
    assert index.calls.iloc[0] == 1 and index.failed_calls.iloc[0] == 0
