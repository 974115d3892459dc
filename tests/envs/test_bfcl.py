"""BFCL: ground truth and spoilt calls through the ordinary rollout score as bfcl-eval scores them, and nothing is shared between two who use it at once."""

import asyncio
import importlib
import json
import random
import threading
from copy import deepcopy

import pytest
from datasets import Dataset

from tirlab.envs import bfcl_data
from tirlab.bench.bfcl import SPOILT, count_calls, replay, spoilt, verdict
from tirlab.envs.bfcl import BFCLEnvironment, bfcl_reward, bfcl_tasks, bfcl_turns, question
from tirlab.envs.bfcl_data import BFCL_CATEGORIES, BFCL_VERSION, bfcl_entries, bfcl_entry, call_text, check_bfcl, documented, endless, fresh_apis, function_names, one_at_a_time
from tirlab.rollout.calls import RolloutLimits
from tirlab.supervision.demonstrations import ScriptedEngine, is_whole
from tirlab.rollout.engines import Sampling
from tirlab.eval.evaluate import evaluate
from tirlab.core.formats import make_format
from tirlab.core.schemas import tool_schemas
from tirlab.rollout.loop import open_row
from tirlab.rollout.schedule import rollouts
from tirlab.core.tiny import tiny_tokenizer
from tirlab.core.trajectory import StopReason, ToolCall, ToolError

TOK = tiny_tokenizer()
TOK.model_max_length = 2**20
ROWS = {c: [dict(r) for r in bfcl_tasks(c, "all")] for c in BFCL_CATEGORIES}
SAMPLE = [row for c in BFCL_CATEGORIES for row in random.Random(c).sample(ROWS[c], 10)]
ODD = ["multi_turn_miss_func_49", "multi_turn_base_90", "multi_turn_base_147"]   # calls a function that is held back; two whose API keeps the list it was given


SHORT = ["multi_turn_base_38", "multi_turn_miss_func_46"]   # fit the tiny policy's context


def row_of(task): return next(r for r in ROWS[bfcl_entry(task)["id"].removeprefix("multi_turn_").rpartition("_")[0]] if r["task_id"] == task)


def scripted(row, turns, call_format=None, limits=RolloutLimits(completion_tokens=2**16)):
    "One rollout that says these turns, whatever comes back."
    prompt, tools, format, environment, _ = open_row(row, TOK, {"bfcl": BFCLEnvironment}, call_format=call_format)
    return rollouts([prompt], None, [tools], [format], limits, owners=[environment], engines={0: ScriptedEngine(lambda: (t for t in turns), format)})[0]


def call(name, **arguments): return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'


# Tasks

def test_rows_are_the_papers_split_over_stories():
    number = lambda rows: [int(t.rpartition("_")[2]) for t in rows["task_id"]]
    sets = {(c, s): number(bfcl_tasks(c, s)) for c in BFCL_CATEGORIES for s in ("train", "test")}
    order = list(range(200))
    random.seed(42); random.shuffle(order)   # as its data/fcl.py draws them
    for c in BFCL_CATEGORIES: assert sets[c, "train"] == sorted(order[:100]) and sets[c, "test"] == sorted(order[100:])
    some = bfcl_tasks(["base", "miss_func", "miss_param"], "train")
    assert len(some) == 300 and {*some["category"]} == {"base", "miss_func", "miss_param"} and {*some["split"]} == {"train"}
    whole = bfcl_tasks("all", "all")
    assert len(whole) == 800 and {*whole["split"]} == {"train", "test"} and len({*whole["task_id"]}) == 800


def test_rows_fit_the_house():
    rows = bfcl_tasks("miss_param", "test")
    assert {"prompt", "answer", "environment", "task_id", "ground_truth"} <= {*rows.column_names} and {*rows["environment"]} == {"bfcl"}
    assert all(r["answer"] and r["prompt"][0]["role"] == "user" for r in rows)


@pytest.mark.parametrize("category, split, says", [("bass", "test", "choose one of base, miss_func"), ("base", "dev", "choose train, test or all")])
def test_an_unknown_category_or_split(category, split, says):
    with pytest.raises(ValueError, match=says): bfcl_tasks(category, split)


def test_an_unknown_task():
    for task in ("multi_turn_base_200", "base_3", ""):
        with pytest.raises(ValueError, match="multi_turn_base_0"): BFCLEnvironment().reset(task_id=task)


@pytest.mark.parametrize("found", [None, "2025.1.1"])
def test_a_benchmark_that_is_not_installed_names_the_command(found, monkeypatch):
    def version(name):
        if found is None: raise bfcl_data.PackageNotFoundError
        return found
    monkeypatch.setattr(bfcl_data, "version", version)
    bfcl_data.require_bfcl.cache_clear(), bfcl_data.bfcl_entries.cache_clear()
    with pytest.raises(ValueError, match=f"pip install --no-deps bfcl-eval=={BFCL_VERSION}"): bfcl_tasks("base")


# What the model is told

def test_documentation_is_json_schema():
    from jsonschema import Draft202012Validator
    for api in {a for c in BFCL_CATEGORIES for e in bfcl_entries(c).values() for a in e["involved_classes"]}:
        for name, schema in documented(api).items():
            Draft202012Validator.check_schema(schema["function"]["parameters"])
            assert schema["function"]["name"] == name and schema["function"]["parameters"]["type"] == "object"


@pytest.mark.parametrize("call_format", [None, "json", "list"])
def test_functions_that_are_held_back_are_told_of_later(call_format):
    row = row_of("multi_turn_miss_func_3")
    prompt, tools, format, environment, _ = open_row(row, TOK, {"bfcl": BFCLEnvironment}, call_format=call_format)
    text = TOK.decode(prompt)
    assert "find(" not in text and '"find"' not in text and ("mkdir(" in text or '"mkdir"' in text)
    assert {"find", "ls", "mkdir"} <= {*tools} and not {"find", "ls"} & {t["function"]["name"] for t in tool_schemas(format.tools)}
    said, more = environment._reply("I cannot.")
    assert '"name": "find"' in said and "What about now?" in said and [t.__name__ for t in more] == ["find", "ls"]


def test_the_syntaxes_show_the_same_functions():
    row = SAMPLE[0]
    text = {f: TOK.decode(open_row(row, TOK, {"bfcl": BFCLEnvironment}, call_format=f)[0]) for f in ("json", "list")}
    tail = lambda t: t.partition('\n{"name": "' + next(iter(documented(bfcl_entry(row["task_id"])["involved_classes"][0]))))
    assert tail(text["json"])[1] and tail(text["json"])[1:] == tail(text["list"])[1:]
    assert "<tool_call>" in tail(text["json"])[0] and "[name(argument=value)]" in tail(text["list"])[0]


# Ground truth and spoilt calls

@pytest.mark.parametrize("call_format", [None, "json", "list"])
def test_ground_truth_passes(call_format):
    rows = (SAMPLE[::2] if call_format else SAMPLE) + [row_of(t) for t in ODD]
    done, rewards = replay(rows, TOK, call_format)
    assert rewards == [1.0] * len(rows) == [float(verdict(r)) for r in rows]
    for row, t in zip(rows, done):
        assert is_whole(t) and sum(u.reply is not None for u in t.turns) == row["requests"] - 1
        assert t.mask.count(1) == sum(len(u.ids) for u in t.turns) and len(t.mask) == len(t.completion_ids)
        for u in t.turns:
            if u.reply is not None: assert not u.calls and u.reply in TOK.decode(u.observation_ids)


def test_each_spoilt_call_scores_as_the_checker_says():
    few = [row_of(r["task_id"]) for r in SAMPLE[::5]]
    bad = [spoilt(r, i, SPOILT[(i + n) % len(SPOILT)]) for n, r in enumerate(few) for i in range(count_calls(r))]
    ours, theirs = replay(bad, TOK)[1], [float(verdict(r)) for r in bad]
    assert ours == theirs and 0 < sum(theirs) < len(bad) / 2


@pytest.mark.slow
@pytest.mark.parametrize("category", BFCL_CATEGORIES)
def test_every_call_of_every_task_spoilt(category):
    bad = [spoilt(r, i, SPOILT[(i + n) % len(SPOILT)]) for n, r in enumerate(ROWS[category]) for i in range(count_calls(r))]
    assert len(bad) > 1100 and replay(bad, TOK)[1] == [float(verdict(r)) for r in bad]


def test_a_conversation_that_ends_early_scores_nothing():
    row = row_of("multi_turn_base_1")
    (t,), _ = replay([row], TOK)
    assert bfcl_reward([t.messages, t.messages[:-1], t.messages[:4], []], [row["task_id"]] * 4) == [1.0, 1.0, 0.0, 0.0]   # the last word is not looked at
    asked = next(i for i, u in enumerate(t.turns) if u.reply is not None)
    room = sum(len(u.ids) + len(u.observation_ids) for u in t.turns[:asked + 1]) - 1
    short = scripted(row, [TOK.decode(u.ids[:-1]) for u in t.turns], limits=RolloutLimits(completion_tokens=room))
    assert short.stop is StopReason.LENGTH and len(short.turns) == asked + 1 and bfcl_reward([short.messages], [row["task_id"]]) == [0.0]


# A user who goes on

def test_tokens_of_the_user_are_not_the_models():
    row = row_of("multi_turn_base_3")
    t = scripted(row, ["Which folder?", "No.", "not reached"])
    assert t.stop is StopReason.ANSWER and len(t.turns) == 2 and [m["role"] for m in t.messages] == ["assistant", "user", "assistant"]
    first, last = t.turns
    assert first.reply == question(bfcl_entry(row["task_id"]), 1)[0] and last.reply is None and not last.observation_ids
    assert t.mask == [1] * len(first.ids) + [0] * len(first.observation_ids) + [1] * len(last.ids)
    assert {*t.turn_of_token} == {0, -1, 1}
    render = lambda m, more: TOK.apply_chat_template(m, add_generation_prompt=more, return_dict=False, tools=tool_schemas(open_row(row, TOK, BFCLEnvironment)[2].tools))
    assert t.prompt_ids + t.completion_ids[:-len(last.ids)] == render([*row["prompt"], *t.messages[:2]], True)
    assert bfcl_reward([t.messages], [row["task_id"]]) == [0.0]


@pytest.mark.parametrize("stop", [StopReason.LENGTH, StopReason.CONTEXT])
def test_a_user_who_does_not_fit(stop):
    row = row_of("multi_turn_base_3")
    prompt = len(open_row(row, TOK, BFCLEnvironment)[0])
    limits = RolloutLimits(60) if stop is StopReason.LENGTH else RolloutLimits(2**16, context_tokens=prompt + 60)
    t = scripted(row, ["Hm.", "No."], limits=limits)
    assert t.stop is stop and len(t.turns) == 1 and not t.turns[0].observation_ids and len(t.messages) == 1


@pytest.mark.parametrize("malformed, turns, stop", [("observe", 3, StopReason.ANSWER), ("stop", 2, StopReason.ANSWER)])
def test_a_broken_call(malformed, turns, stop):
    "Told of by default; as a final turn, which is what bfcl-eval makes of it, the user goes on."
    row = row_of("multi_turn_base_3")
    t = scripted(row, ["<tool_call>\n{oops", "Well.", "No."][:turns], limits=RolloutLimits(completion_tokens=2**16, malformed=malformed))
    assert t.stop is stop and len(t.turns) == turns and (t.turns[0].results[0].error is ToolError.MALFORMED if malformed == "observe" else t.turns[0].reply is not None)


def test_an_environment_without_a_user_ends_at_the_answer():
    class Plain:
        def add(self, a: int) -> int: return a + 1
    format = make_format(None, TOK, [])
    t = rollouts([format.prompt([{"role": "user", "content": "hi"}])], None, [{}], [format], RolloutLimits(200), owners=[Plain()], engines={0: ScriptedEngine(lambda: (t for t in ["7"]), format)})[0]
    assert t.stop is StopReason.ANSWER and len(t.turns) == 1 and t.turns[0].reply is None


def test_functions_that_come_later_are_typed_in_xml():
    "What a parameter's text means depends on its schema, which the format gets together with the user's words."
    t = scripted(row_of("multi_turn_miss_func_1"), ["Hm.", "Hm.", '<tool_call>\n<function=tail>\n<parameter=file_name>\na\n</parameter>\n<parameter=lines>\n3\n</parameter>\n</function>\n</tool_call>',
                                                    *["Hm."] * 5], "xml")
    assert t.calls == [ToolCall("tail", {"file_name": "a", "lines": 3})]
    held = next(r for r in ROWS["miss_func"] if "fillFuelTank" in str(bfcl_entry(r["task_id"])["missed_function"]))
    fill = '<tool_call>\n<function=fillFuelTank>\n<parameter=fuelAmount>\n3.5\n</parameter>\n</function>\n</tool_call>'
    turn = int(next(iter(bfcl_entry(held["task_id"])["missed_function"])))
    t = scripted(held, [fill, *["Hm."] * turn, fill, *["Hm."] * 9], "xml")
    assert [c.arguments for c in t.calls] == [{"fuelAmount": "3.5"}, {"fuelAmount": 3.5}]


# What must not be evaluated

@pytest.mark.parametrize("bad", [ToolCall("open", {"file": "x", "mode": "w"}), ToolCall("__import__", {"name": "os"}), ToolCall("cd", {"folder=exit(), a": 1}), ToolCall("cd", {"class": 1}),
                                 ToolCall("power", {"base": 10, "exponent": 10**9}), ToolCall("logarithm", {"value": 2, "base": 3, "precision": 10**9}),
                                 ToolCall("round_number", {"number": 5, "decimal_places": -10**9})])
def test_the_checker_gets_no_code(bad):
    functions = function_names({"involved_classes": ["GorillaFileSystem", "MathAPI"]})
    assert call_text(bad, functions) == "no_such_function()"


def test_a_call_that_would_never_end_is_answered_at_once():
    row = next(r for r in ROWS["base"] if "MathAPI" in bfcl_entry(r["task_id"])["involved_classes"])
    t = scripted(row, [call("power", base=9, exponent=9**9), *["Hm."] * 9])
    assert t.results[0].error is ToolError.EXCEPTION and "too many digits" in t.results[0].content
    assert bfcl_reward([t.messages], [row["task_id"]]) == [0.0] and not endless(ToolCall("power", {"base": 2.5, "exponent": 10**9}))


def test_arguments_that_no_api_takes():
    row = row_of("multi_turn_base_3")
    t = scripted(row, [call("cd", folder=["a"]), call("cd", where="a"), call("nothing", a=1), *["Hm."] * 9])
    assert [r.error for r in t.results][1:] == [ToolError.EXCEPTION, ToolError.UNKNOWN]
    assert bfcl_turns(t.messages, row["task_id"])[0] == [["cd(folder=['a'])"], ["cd(where='a')"], ["no_such_function()"]]
    assert bfcl_reward([t.messages], [row["task_id"]]) == [0.0]


# Isolation

def module_state():
    "What the APIs' modules hold, long context and defaults."
    names = ("long_context", "trading_bot", "travel_booking", "vehicle_control", "message_api", "ticket_api", "posting_api", "gorilla_file_system")
    modules = [importlib.import_module(f"bfcl_eval.eval_checker.multi_turn_eval.func_source_code.{n}") for n in names]
    return {f"{m.__name__}.{k}": deepcopy(v) for m in modules for k, v in vars(m).items() if k.isupper() and isinstance(v, (dict, list, str, int, float))}


def test_the_same_task_beside_itself_gives_the_same():
    rows = [r for r in SAMPLE[::2] for _ in range(2)]
    done, rewards = replay(rows, TOK)
    assert rewards == [1.0] * len(rows)
    for a, b in zip(done[::2], done[1::2]): assert a.messages == b.messages and a.completion_ids == b.completion_ids


def test_nothing_is_left_in_the_package():
    before, utils = module_state(), importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils")
    known = {*vars(utils)}
    row = next(r for r in ROWS["long_context"] if "TravelAPI" in bfcl_entry(r["task_id"])["involved_classes"])
    entry = bfcl_entry(row["task_id"])
    kept = deepcopy(entry)
    card = next(iter(importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.func_source_code.travel_booking").CREDIT_CARD_EXTENSION))
    one, other = BFCLEnvironment(), BFCLEnvironment()
    for e in (one, other): e.reset(**row)
    one._apis["TravelAPI"].credit_card_list[card]["balance"] = 0
    assert other._apis["TravelAPI"].credit_card_list[card]["balance"] > 0
    replay([row, *SAMPLE[::4]], TOK)
    assert module_state() == before and {*vars(utils)} == known and entry == kept


def test_checks_at_once_do_not_meet():
    "bfcl-eval keeps instances under the name of a model and a task; two checks of one task, one right and one wrong, in many threads."
    row = row_of("multi_turn_base_1")
    entry = bfcl_entry(row["task_id"])
    right = [[[c] for c in turn] for turn in entry["ground_truth"]]
    jobs = [right, right[:-1] + [right[-1] + [["no_such_function()"]]], [[], *right[1:]]] * 20
    said = [None] * len(jobs)
    def work(i): said[i] = check_bfcl(row["task_id"], jobs[i])["valid"]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for t in threads: t.start()
    for t in threads: t.join()
    assert said == [True, True, False] * 20


def test_precision_is_set_back():
    import decimal
    import mpmath
    before = mpmath.mp.dps, decimal.getcontext().prec
    with one_at_a_time():
        mpmath.mp.dps = 3
        decimal.getcontext().prec = 3
    assert (mpmath.mp.dps, decimal.getcontext().prec) == before


def test_reset_begins_anew():
    row = next(r for r in ROWS["base"] if bfcl_entry(r["task_id"])["involved_classes"] == ["GorillaFileSystem"])
    e = BFCLEnvironment()
    e.reset(**row)
    tools, fresh = {t.__name__: t for t in e._tools()}, fresh_apis(bfcl_entry(row["task_id"]))["GorillaFileSystem"]
    tools["mkdir"](dir_name="anew")
    assert e._apis["GorillaFileSystem"] != fresh or vars(e._apis["GorillaFileSystem"]) != vars(fresh)
    said = e._reply("done")
    e.reset(**row)
    assert "anew" not in tools["ls"]() and e._reply("done") == said or e._reply("done") is None


# Evaluation

def test_an_evaluation_of_a_policy_that_talks():
    "`evaluate` drives the same rollout: an engine that says one thing is asked once for each request of the user."
    rows = Dataset.from_list(SAMPLE[:4])
    class Says:
        asked = 0
        async def generate(self, ids, sampling):
            from tirlab.rollout.engines import Sampled
            Says.asked += 1
            await asyncio.sleep(0)
            return Sampled(TOK.encode("Hm.", add_special_tokens=False) + [TOK.eos_token_id], None, "end")
        def ready(self, version=None):
            from contextlib import nullcontext
            return nullcontext()
    from types import SimpleNamespace
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=TOK.eos_token_id), config=SimpleNamespace())
    result = evaluate(model, TOK, rows, {"bfcl": BFCLEnvironment}, bfcl_reward, limits=RolloutLimits(2**16), sampling=Sampling(64), engine=Says())
    assert Says.asked == sum(rows["requests"]) and result.rewards == [0.0] * 4 and result.success == 0


# Training

@pytest.mark.parametrize("several", [False, True])
def test_the_trainer_rolls_it_out(several, tmp_path):
    "A demonstration in each group: tools of the task, the user's words masked, reward 1; the others sample from the prompt that `open_row` makes."
    from tirlab.all import Hints, OffPolicy, TIRConfig, TIRTrainer, demonstrate, tiny_policy
    rows = Dataset.from_list([row_of(t) for t in SHORT])
    args = TIRConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=6, num_generations=3, max_completion_length=1300, learning_rate=1e-4, seed=0, save_strategy="no",
                     disable_tqdm=True, report_to="none", probe="off", trace=False, max_turn_length=200, max_tool_calling_iterations=12)
    t = TIRTrainer(tiny_policy(), bfcl_reward, args, rows, environment_factory={"bfcl": BFCLEnvironment} if several else BFCLEnvironment, supervision=[OffPolicy(1), Hints(1)])
    t.current_gradient_accumulation_steps = 1
    t.model.train()
    out = t._generate_and_score_completions([rows[i] for i in range(2) for _ in range(3)])
    assert [x.origin for x in t.batch.trajectories] == ["demonstration", "hinted", "sampled"] * 2 and t.batch.rewards[:, 0].tolist()[::3] == [1.0, 1.0]
    limits = RolloutLimits(2**16)
    for i, own in enumerate(demonstrate(list(rows), TOK, {"bfcl": BFCLEnvironment}, limits=limits)):
        shown = t.batch.trajectories[3 * i]
        assert shown.prompt_ids == own.prompt_ids == t.batch.trajectories[3 * i + 2].prompt_ids and shown.completion_ids == own.completion_ids
        assert out["tool_mask"][3 * i].tolist()[:len(own.mask)] == own.mask
    assert "tools_of_the_task" not in TOK.decode(t.batch.trajectories[0].prompt_ids)
