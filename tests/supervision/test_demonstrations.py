"""Right calls as rollouts and as rows for TRL's SFTTrainer: real environments, true tokens, and a loss that sees the model's tokens alone."""

import asyncio
import hashlib
import json
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tirlab.rollout.calls import RolloutLimits
from tirlab.supervision.demonstrations import Demonstrator, ScriptedEngine, call_ids, demonstrate, is_whole, message_ids, read_ground_truth
from tirlab.rollout.engines import GenerateEngine
from tirlab.envs.environments import PythonEnvironment, environment_tools
from tirlab.eval.evaluate import evaluate
from tirlab.sandbox.executions import SandboxFault
from tirlab.core.formats import make_format
from tirlab.rewards.outcome import answer_reward
from tirlab.rollout.loop import open_row, rollout
from tirlab.rollout.schedule import rollouts
from tirlab.supervision.lessons import sft_rows
from tirlab.core.syntax import SYNTAXES
from tirlab.envs.tasks import ENVIRONMENTS, make_tasks
from tirlab.core.tiny import tiny_policy, tiny_tokenizer
from tirlab.core.trajectory import StopReason, ToolCall, ToolError, Trajectory
from tirlab.recipes.warmup import FLAWS, FORMATS, demonstrations

TOK = AutoTokenizer.from_pretrained(tiny_policy())
NAMES = [None, *SYNTAXES]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ROWS = make_tasks("all", n=12)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_policy())


def demos(name=None, rows=ROWS, **options):
    return demonstrate(rows, TOK, ENVIRONMENTS, call_format=name, **options)


def task(*turns, answer=None):
    "A row whose turns call `python` with these codes; a tuple makes several calls in one turn."
    write = lambda code: json.dumps({"name": "python", "arguments": {"code": code}})
    calls = [[write(c) for c in t] if isinstance(t, tuple) else write(t) for t in turns]
    return {"prompt": [{"role": "user", "content": "go"}], "ground_truth": calls} | ({"answer": answer} if answer else {})


# What a row says

def test_ways_to_write_ground_truth():
    call, want = {"name": "find", "arguments": {"name": "rab", "box": 7}}, ToolCall("find", {"name": "rab", "box": 7})
    wrapped = {"type": "function", "function": {"name": "find", "arguments": json.dumps(call["arguments"])}}
    for entry in (call, json.dumps(call), wrapped, json.dumps(wrapped), [call], json.dumps([call])):
        assert read_ground_truth({"ground_truth": [entry], "answer": 3}) == ([[want]], "3")
    assert read_ground_truth({"ground_truth": [[call, call], call]}) == ([[want, want], [want]], None) and read_ground_truth({"ground_truth": [], "answer": "7"}) == ([], "7")
    assert read_ground_truth({"ground_truth": [{"name": "f", "arguments": None}]}) == ([[ToolCall("f", {})]], None)


def test_a_table_of_dicts_gives_back_what_was_put_in():
    "Arrow gives every dict of a column the same keys."
    calls = [{"name": "find", "arguments": {"box": 7}}, {"name": "read", "arguments": {"key": "k17"}}]
    table = Dataset.from_list([{"ground_truth": calls}])
    assert table[0]["ground_truth"][0]["arguments"] == {"box": 7, "key": None}
    assert read_ground_truth(table[0])[0] == [[ToolCall(c["name"], c["arguments"])] for c in calls]


@pytest.mark.parametrize("row, said", [
    ({}, "`ground_truth` is missing"), ({"ground_truth": None}, "`ground_truth` is missing"), ({"ground_truth": "f(a=1)"}, "must be a list of calls"),
    ({"ground_truth": []}, "nothing to say"), ({"ground_truth": ["f(a=1)"]}, "Entry 0 .* is no call"), ({"ground_truth": [[]], "answer": "1"}, "Entry 0"),
    ({"ground_truth": [{"name": "f", "arguments": "x"}]}, "Entry 0"), ({"ground_truth": [{"name": 3}]}, "Entry 0"), ({"ground_truth": [7]}, "Entry 0"),
])
def test_rows_that_do_not_say_are_refused_in_one_sentence(row, said):
    with pytest.raises(ValueError, match=said) as e: read_ground_truth(row)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=f"Row 1: .*{said}"): demonstrate([ROWS[0], row | {"prompt": ROWS[0]["prompt"], "environment": "repair"}], TOK, ENVIRONMENTS)


# How it is written

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("template", [None, "qwen2_5", "qwen2_5_training", "qwen3_training"])
def test_turns_are_what_the_template_would_write(name, template):
    text, tools = template and (TEMPLATES / f"{template}.jinja").read_text(), list(environment_tools(ENVIRONMENTS["lookup"]()).values())
    format, calls = make_format(name, TOK, tools, text), [ToolCall("find", {"name": "rab", "box": 42}), ToolCall("read", {"key": "k17"})]
    ids, asked = call_ids(calls, format), [{"role": "user", "content": "Box 42?"}]
    assert format.parse(ids, format.prompt(asked))[1] == calls and ids[-1] == TOK.eos_token_id
    message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]}
    if name is None:
        whole = TOK.apply_chat_template([*asked, message], tools=format.tools, chat_template=text, return_dict=False)
        assert whole[:len(format.prompt(asked)) + len(ids)] == format.prompt(asked) + ids
    assert ("<think>" in TOK.decode(ids)) == (template == "qwen3_training")
    assert TOK.decode(message_ids({"role": "assistant", "content": "85"}, format)).endswith("85<|im_end|>")


def test_a_template_without_tools_or_ends_gets_the_plain_text():
    template = "{% for m in messages %}{{ raise_exception('no') if m.tool_calls is defined }}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    for name in NAMES:
        format = make_format(name, TOK, [], template)
        assert message_ids({"role": "assistant", "content": "85"}, format) is None
        if name: assert TOK.decode(call_ids([ToolCall("python", {"code": "1"})], format)) == SYNTAXES[name].render([ToolCall("python", {"code": "1"})]) + "<|im_end|>"


@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_solve_their_task_in_any_format(name):
    done = demos(name)
    assert answer_reward([t.messages for t in done], ROWS["answer"]) == [1.0] * 12 and all(map(is_whole, done))
    assert [t.calls for t in done] == [[c for turn in read_ground_truth(r)[0] for c in turn] for r in ROWS]
    assert all(t.logprobs is None and t.origin == "demonstration" and len(t.turns) > 1 for t in done)
    prompts = [open_row(r, TOK, ENVIRONMENTS, call_format=name)[0] for r in ROWS]
    assert [t.prompt_ids for t in done] == prompts
    bare = [{k: v for k, v in r.items() if k != "answer"} for r in ROWS]   # the last tool knows it too
    assert [t.completion_ids for t in demos(name, bare)] == [t.completion_ids for t in done]


@pytest.mark.parametrize("name", NAMES)
def test_several_calls_in_one_turn_and_one_call_a_turn(name):
    row = task(("1+1", "2+2"), "3+3", ("4+4", "5*5"))
    many, single = (demonstrate([row], TOK, PythonEnvironment, call_format=name, limits=RolloutLimits(2000, first_call_only=one, last_turn_prompt="Answer now.", tool_rounds=n))[0]
                    for one, n in ((False, 3), (True, 5)))
    assert [len(t.calls) for t in many.turns] == [2, 1, 2, 0] and [len(t.calls) for t in single.turns] == [1] * 5 + [0]
    for t in (many, single):
        assert [r.content for r in t.results] == ["2", "4", "6", "8", "25\nAnswer now."] and t.messages[-1]["content"] == "25" and is_whole(t)
        assert all(turn.ids[-1] == TOK.eos_token_id for turn in t.turns)


def test_plain_functions_coroutines_and_words_of_reset():
    class Greets(PythonEnvironment):
        def reset(self, **row): super().reset(**row); return f" (answer {row['answer']})"
    async def double(n: int) -> int:
        """
        Twice a number.

        Args:
            n: Number.
        """
        await asyncio.sleep(0.01)
        return 2 * n
    row = task("1+1", answer="x") | {"ground_truth": [task("1+1")["ground_truth"][0], '{"name": "double", "arguments": {"n": 21}}']}
    (t,) = demonstrate([row], TOK, Greets, [double], write=r"\boxed{{{}}}".format)
    assert [r.content for r in t.results] == ["2", "42"] and t.messages[-1]["content"] == r"\boxed{x}" and "go (answer x)" in TOK.decode(t.prompt_ids)
    assert "double" in TOK.decode(t.prompt_ids) and "python" in TOK.decode(t.prompt_ids)
    with pytest.raises(ValueError, match="must name one of arithmetic, lookup, repair"): demonstrate([row], TOK, ENVIRONMENTS)


@pytest.mark.parametrize("name", NAMES)
def test_another_template_and_its_variables_hold_for_every_turn(name):
    template = TOK.chat_template.replace("'<|im_start|>user'", "'<|im_start|>user' + mood").replace("+ m.role +", "+ m.role + (mood if m.role == 'user' else '') +")
    (t,) = demonstrate([task("1+1", "2+2")], TOK, PythonEnvironment, call_format=name, chat_template=template, template_kwargs={"mood": "!"})
    assert TOK.decode(t.prompt_ids + t.completion_ids).count("<|im_start|>user!\n") == 3 and is_whole(t)
    assert t.completion_ids == [i for turn in t.turns for i in turn.ids + turn.observation_ids] and t.messages[-1]["content"] == "4"


def test_rows_are_opened_as_evaluation_opens_them(model):
    result = evaluate(model, TOK, ROWS, ENVIRONMENTS, call_format="xml")
    assert [t.prompt_ids for t in result.trajectories] == [open_row(r, TOK, ENVIRONMENTS, call_format="xml")[0] for r in ROWS]


# What goes wrong

@pytest.mark.parametrize("row, limits, stop, errors, whole", [
    (task("1+1"), RolloutLimits(500), StopReason.ANSWER, [None], True),
    (task("1+1"), RolloutLimits(10), StopReason.LENGTH, [], False),
    (task("1+1", "2+2"), RolloutLimits(500, tool_rounds=1), StopReason.MAX_TURNS, [None], False),
    (task("1+1"), RolloutLimits(500, context_tokens=50), StopReason.CONTEXT, [None], False),
    (task("1+1") | {"ground_truth": ['{"name": "open", "arguments": {}}']}, RolloutLimits(500), StopReason.ANSWER, [ToolError.UNKNOWN], False),
    (task("1+1") | {"ground_truth": ['{"name": "python", "arguments": {"cod": "1"}}']}, RolloutLimits(500), StopReason.ANSWER, [ToolError.EXCEPTION], False),
    (task("1+1") | {"ground_truth": ['{"name": "python", "arguments": {"cod": "1"}}', *task("1")["ground_truth"]]}, RolloutLimits(500), StopReason.ANSWER, [ToolError.EXCEPTION, None], True),
    (task("1+1"), RolloutLimits(500, answer_pattern="boxed"), StopReason.VOID, [None], False),
    (task("1+1"), RolloutLimits(500, answer_pattern="boxed", void="observe"), StopReason.FAILED, [], False),
])
def test_what_went_wrong_is_said(row, limits, stop, errors, whole):
    (t,) = demonstrate([row], TOK, PythonEnvironment, limits=limits)
    assert (t.stop, [r.error for r in t.results], is_whole(t)) == (stop, errors, whole) and len(t.completion_ids) <= limits.completion_tokens
    if stop is StopReason.FAILED: assert "answer_pattern" in t.error and sft_rows([t]).num_rows == 0


def test_a_demonstration_begins_again_where_the_sandbox_failed():
    class Fails(PythonEnvironment):
        faults = 0
        def python(self, code: str) -> str:
            """
            Run Python code.

            Args:
                code: Python source.
            """
            Fails.faults += 1
            if Fails.faults in (2, 5): raise SandboxFault("gone")
            return super().python(code)
    first, second = demonstrate([task("1+1", "2+2"), task("1+1")], TOK, Fails, workers=1)
    assert [r.content for r in first.results] == ["2", "4"] and is_whole(first) and is_whole(second)


def test_environments_are_fresh_and_closed():
    made = []
    class Watched(PythonEnvironment):
        def __init__(self): made.append(self); self.open = False
        def reset(self, **row): self.open = True
        def _close(self): self.open = False
    demonstrate([task("1+1")] * 5, TOK, Watched, batch_size=2)
    assert len({*map(id, made)}) == 5 and not any(e.open for e in made)


# Among rollouts

@pytest.mark.parametrize("schedule", ["turn", "eager"])
def test_rows_of_ones_own_change_no_other(model, schedule):
    model.eval()
    rows = ROWS.select(range(6))
    def go(own):
        prompts, named, formats, owned, _ = map(list, zip(*(open_row(r, TOK, ENVIRONMENTS) for r in rows)))
        engines = {i: Demonstrator(*read_ground_truth(ROWS[i]), formats[i]) for i in own}
        return rollouts(prompts, GenerateEngine(model, TOK, schedule == "eager"), named, formats, RolloutLimits(250), seed=(5, "own"), first_row=40, schedule=schedule, owners=owned, engines=engines)
    without = go([])
    for own in [1, 3], [*range(5)], [*range(6)]:
        for i, (a, b) in enumerate(zip(go(own), without)):
            if i in own: assert a.logprobs is None and a.messages[-1]["content"] == ROWS[i]["answer"]
            else: assert (a.completion_ids, a.mask, a.stop) == (b.completion_ids, b.mask, b.stop) and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_the_gate_does_not_wait_for_rows_of_ones_own(model):
    "All other rows are sampled together, the first time and every time, though a demonstration is still busy with its tool."
    asked = []
    class Counts:
        async def generate(self, ids, sampling): asked.append(len(asked)); return await inner.generate(ids, sampling)
    inner, limits = ScriptedEngine(lambda: iter(["7"]), make_format(None, TOK, [])), RolloutLimits(100)
    class Slow:
        async def generate(self, ids, sampling):
            for _ in range(1000):
                if asked: break
                await asyncio.sleep(0.01)
            return await ScriptedEngine(lambda: iter(["7"]), make_format(None, TOK, [])).generate(ids, sampling)
    done = rollouts([TOK.encode("hi")] * 2, Counts(), [None] * 2, [make_format(None, TOK, [])] * 2, limits, engines={1: Slow()})
    assert asked == [0] and [t.stop for t in done] == [StopReason.ANSWER] * 2


def test_the_policy_that_is_shipped_was_taught_this():
    "Warm-up demonstrations, flaws and all, token by token."
    rows, digest = list(make_tasks("all", n=60)), hashlib.sha256()
    for flaws in (None, FLAWS):
        for t in demonstrations(rows, tiny_tokenizer(), flaws, 7, FORMATS): digest.update(json.dumps([t.prompt_ids, t.completion_ids, t.mask]).encode())
    assert digest.hexdigest() == "666a55e66d6d8a5b94858618762cd3a42304977f6fc525572c1b6c139fdefad4"


# Rows for SFTTrainer

def trainer(model, rows, folder, **options):
    options = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, report_to="none", save_strategy="no", disable_tqdm=True,
                   per_device_train_batch_size=4, learning_rate=1e-3, max_steps=1, logging_steps=1, shuffle_dataset=False) | options
    return SFTTrainer(model, SFTConfig(str(folder), **options), train_dataset=rows, processing_class=TOK)


def by_hand(model, trajectories):
    "Mean negative log-probability of the model's own tokens, each trajectory by itself, and their number."
    total, n = 0.0, 0
    for t in trajectories:
        ids, mask = t.prompt_ids + t.completion_ids, [0] * len(t.prompt_ids) + t.mask
        with torch.no_grad(): logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logprobs[i - 1, ids[i]].item() for i in range(1, len(ids)) if mask[i])
        n += sum(mask)
    return total / n, n


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_sees_the_models_tokens_and_no_others(model, name, prepared, tmp_path):
    done = demos(name, ROWS.select(range(4)))
    seen, want = [], by_hand(model, done)
    sft = trainer(model, sft_rows(done), tmp_path, dataset_kwargs={"skip_prepare_dataset": not prepared})
    compute = sft.compute_loss
    sft.compute_loss = lambda m, inputs, **kwargs: seen.append({k: v.clone() for k, v in inputs.items()}) or compute(m, inputs, **kwargs)
    sft.train()
    (batch,) = seen
    found = {tuple(ids[m == 1].tolist()): labels.tolist() for ids, m, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])}
    for t in done:
        labels = found[tuple(t.prompt_ids + t.completion_ids)]
        prompt, rest, padding = labels[:len(t.prompt_ids)], labels[len(t.prompt_ids):len(t.prompt_ids + t.completion_ids)], labels[len(t.prompt_ids + t.completion_ids):]
        assert {*prompt, *padding} == {-100} and rest == [i if m else -100 for i, m in zip(t.completion_ids, t.mask)]
        at = 0
        for turn in t.turns:
            assert rest[at:at + len(turn.ids)] == turn.ids and turn.ids[-1] == TOK.eos_token_id
            at += len(turn.ids)
            assert {*rest[at:at + len(turn.observation_ids)]} <= {-100} and len(turn.observation_ids) > 0 or turn is t.turns[-1]
            at += len(turn.observation_ids)
    assert (batch["labels"] != -100).sum() == want[1]
    assert sft.state.log_history[0]["loss"] == pytest.approx(want[0], abs=1e-4)


def test_prompts_and_observations_are_read_and_not_learnt(model, tmp_path):
    "They have no log-probability in the loss, and the one that each model token has is that of a plain forward pass behind them."
    done = demos(None, ROWS.select(range(4)))
    sft = trainer(model, sft_rows(done), tmp_path)
    sft.train()   # the head is fused now
    batch = next(iter(sft.get_train_dataloader()))
    with torch.no_grad():
        plain = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        fused = model(**batch, fused_lm_head=True)
    labels = batch["labels"][:, 1:]
    want = plain.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    assert torch.allclose(fused.log_probs, want, atol=1e-4) and not fused.log_probs[labels == -100].any()
    assert torch.equal(fused.label_mask.bool(), labels != -100) and fused.label_mask.sum() == sum(sum(t.mask) for t in done)


def test_what_is_too_long_loses_its_beginning(model, tmp_path):
    done = demos(None, ROWS.select(range(4)))
    n = min(len(t.completion_ids) for t in done) - 5   # within the first turn of the shortest
    rows = sft_rows(done, max_length=n)
    assert all(r["input_ids"] == (t.prompt_ids + t.completion_ids)[-n:] and r["labels"][0] == -100 and r["labels"][1:] == [i if m else -100 for i, m in zip(t.completion_ids, t.mask)][1 - n:]
               for t, r in zip(done, rows))
    model.eval()
    total = count = 0
    for r in rows:
        with torch.no_grad(): logprobs = model(torch.tensor([r["input_ids"]])).logits[0].log_softmax(-1)
        kept = [i for i in range(1, n) if r["labels"][i] != -100]
        total, count = total - sum(logprobs[i - 1, r["labels"][i]].item() for i in kept), count + len(kept)
    sft = trainer(model, rows, tmp_path)
    sft.train()
    assert sft.state.log_history[0]["loss"] == pytest.approx(total / count, abs=1e-4)
    assert sft_rows(done, max_length=10**6).to_list() == sft_rows(done).to_list()


def test_rows_pass_packing_and_padding_free_unharmed(tmp_path, model):
    done = demos(None, ROWS.select(range(4)))
    packed = trainer(model, sft_rows(done), tmp_path, packing=True, packing_strategy="wrapped", max_length=64).train_dataset
    assert [i for r in packed for i in r["labels"]] == [i for r in sft_rows(done) for i in r["labels"]]


def test_nothing_to_learn_is_no_row():
    placeholder = Trajectory([1, 2], [], StopReason.FAILED, "gone")
    rows = sft_rows([placeholder])
    assert len(rows) == 0 and rows.column_names == ["input_ids", "labels"]
    whole, cut = demos()[0], demos(limits=RolloutLimits(10))[0]
    assert len(sft_rows([whole, cut, placeholder])) == 2 and len(sft_rows([whole, cut, placeholder], keep=is_whole)) == 1


def test_rollouts_worth_repeating_are_rows_too(model):
    done = evaluate(model, TOK, make_tasks("arithmetic", "train", 16), PythonEnvironment).trajectories
    rows = sft_rows(done, keep=lambda t: t.stop is StopReason.ANSWER)
    assert [[i for i in r["labels"] if i != -100] for r in rows] == [[i for turn in t.turns for i in turn.ids] for t in done if t.stop is StopReason.ANSWER]


def test_a_script_hears_what_the_last_tool_said():
    "Also of a turn with several calls, of words that look like the frame, and in every format."
    heard = []
    def script(format):
        heard.append((yield call_ids([ToolCall("python", {"code": "print('a\\n</tool_response>b')"}), ToolCall("python", {"code": "print(' c ')"})], format)))
        heard.append((yield "<tool_call> broken" if format.syntax in ("json", "xml") else call_ids([ToolCall("open", {})], format)))
        yield "done"
    for name in NAMES:
        format, environment = make_format(name, TOK, [PythonEnvironment().python]), PythonEnvironment()
        t = asyncio.run(rollout(task("1"), ScriptedEngine(lambda format=format: script(format), format), environment, format, RolloutLimits(1000)))
        assert t.stop is StopReason.ANSWER and heard == [t.results[1].content, t.results[2].content]
        heard.clear()
