"""Call formats: every syntax and its inverse, structural states, cutting, and chat templates other than ours."""

import asyncio
from types import SimpleNamespace
import json
import keyword
from pathlib import Path

import pytest
import trl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.engines import Sampled, cut_turn
from tirlab.rollout.loop import rollout
from tirlab.core.families import template_syntax
from tirlab.core.formats import ChatFormat, TextFormat, make_format, render_call
from tirlab.core.observations import observation_ids
from tirlab.core.syntax import SYNTAXES
from tirlab.envs.tasks import make_tasks
from tirlab.core.tiny import tiny_tokenizer
from tirlab.core.trajectory import StopReason, ToolCall, ToolResult, TurnKind
from tirlab.core.turns import control_ids, turn_kind
from tirlab.recipes.warmup import demonstrations

TOK = tiny_tokenizer()
NAMES = ["chat", *SYNTAXES]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PIECES = ["<tool_call>", "</tool_call>", "<function=f>", "<function=", "<parameter=a>", "</parameter>", "</function>", "<tool_response>",
          "</tool_response>", "<|im_end|>", "```", "```python\n", "```tool_code\n", "\n```", "````", "`", "[", "]", "[f(", "f(a=1)", ")]", "a='",
          "'", '"', "'''", "(", ")", "{", "}", ",",
          '{"name": "f", "arguments": {"a": 1}}', '{"name": "f"', "1", "NaN", "\n", " ", "\\", "#", "ä"]
WILD = st.text(max_size=20) | st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)
WORDS = st.from_regex(r"[a-z_][a-z_0-9]{0,8}", fullmatch=True).filter(lambda s: not keyword.iskeyword(s))
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(NUMBERS | WILD, lambda v: st.lists(v, max_size=3) | st.dictionaries(WILD, v, max_size=3), max_leaves=6)
CALLS = st.lists(st.builds(ToolCall, WORDS, st.dictionaries(WORDS, VALUES, max_size=3)) | st.builds(lambda c: ToolCall("python", {"code": c}), WILD),
                 min_size=1, max_size=3, unique_by=lambda c: c.name)


def python(code: str) -> str:
    """
    Run Python code.

    Args:
        code: Python source.
    """


def find(name: str, box: int) -> str:
    """
    Find the key of a box.

    Args:
        name: Owner of the box.
        box: Number of the box.
    """


def schemas(calls):
    "Tools whose parameters have the types of these arguments."
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
    kind = lambda v: {"type": names[type(v)]}
    typed = lambda c: {"properties": {k: kind(v) for k, v in c.arguments.items()}}
    return [{"type": "function", "function": {"name": c.name, "parameters": typed(c)}} for c in calls]


# Writing and reading

@given(calls=CALLS, before=st.sampled_from(["", "Let me see.\n"]), after=st.sampled_from(["", "\nDone."]))
@settings(max_examples=120, deadline=None)
def test_reading_is_the_inverse_of_writing(calls, before, after):
    for name in SYNTAXES:      # to make up calls takes longer than to write and read them
        try: text = SYNTAXES[name].render(calls)
        except ValueError:
            assert name == "xml" and any(m in str(c.arguments) for c in calls for m in SYNTAXES[name].markers)      # the only syntax without escapes
            continue
        back, content = SYNTAXES[name].parse(before + text + after, schemas(calls))
        assert back == calls and content == (before + after).strip(), name
        assert [[type(v) for v in c.arguments.values()] for c in back] == [[type(v) for v in c.arguments.values()] for c in calls], name


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1: 2}, b"x", 10**5000, {1}, object()], ids=lambda v: type(v).__name__)
def test_what_is_no_json_data_is_never_written(name, value):
    with pytest.raises(ValueError):
        SYNTAXES[name].render([ToolCall("f", {"a": value})])


@pytest.mark.parametrize("name", ["xml", "fenced", "list"])
@pytest.mark.parametrize("tool, argument", [("a b", "a"), ("f)] [g", "a"), ("f", "a b"), ("", "a"), ("f>\n<function=g", "a")])
def test_names_that_a_syntax_cannot_carry_are_refused(name, tool, argument):
    with pytest.raises(ValueError, match=f"{name}.* cannot carry"):
        SYNTAXES[name].render([ToolCall(tool, {argument: 1})])


@given(text=WILD)
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text):
    for name, syntax in SYNTAXES.items():
        try: calls, content = syntax.parse(text, [python, find])
        except ValueError: continue
        for call in calls: assert json.loads(json.dumps(call.arguments, ensure_ascii=False).encode()) == call.arguments, name      # finite and valid Unicode
        assert content == text if not calls else syntax.end_of_call(text) <= len(text), name


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("bomb", ["[" * 100_000, "(" * 100_000, '{"a":' * 100_000, "-" * 100_000 + "1", "9" * 100_000, "1e999", "NaN",
                                  "'\\ud800'", '"\\ud800"', "[" * 90 + "]" * 90], ids=range(10))
def test_what_breaks_a_parser_is_just_broken(name, bomb):
    wrapped = {"json": f'<tool_call>{{"name": "f", "arguments": {{"a": {bomb}}}}}</tool_call>', "fenced": f"```tool_code\nf(a={bomb})\n```",
               "xml": f"<tool_call><function=f><parameter=a>{bomb}</parameter></function></tool_call>", "list": f"[f(a={bomb})]"}[name]
    try: calls, _ = SYNTAXES[name].parse(wrapped, [{"name": "f", "parameters": {"properties": {"a": {"type": "array"}}}}])
    except ValueError: return
    assert name == "xml" and calls[0].arguments == {"a": bomb}      # what cannot be typed stays text


VALUES_NOT_READ = ["open('there', 'w')", "__import__('os').mkdir('there')", "1+1", "[x for x in 'a']", "f'{1}'", "lambda: 1", "b'x'", "{1}", "1j", "...", "x"]
CALLS_NOT_READ = ["f(*[1])", "f(**{'a': 1})", "f('a')", "f(a=1, a=2)", "f(a=1)(a=1)", "f[0](a=1)", "f(a=1); g(a=1)"]


@pytest.mark.parametrize("call", [*(f"f(a={v})" for v in VALUES_NOT_READ), *CALLS_NOT_READ])
def test_nothing_is_evaluated(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert turn_kind(f"```tool_code\n{call}\n```", syntax="fenced") is TurnKind.TEXT_POLLUTION
    assert turn_kind(f"[g(a=1), {call}]", syntax="list") is TurnKind.TEXT_POLLUTION
    assert not list(tmp_path.iterdir())


def test_xml_follows_the_types_of_the_tool():
    def f(text: str, maybe: str | None, number: int, numbers: list[str], anything): ...
    values = {"text": "12", "maybe": "12", "number": "12", "numbers": '["1"]', "anything": "12", "unknown": "12"}
    text = SYNTAXES["xml"].render([ToolCall("f", values)])
    assert SYNTAXES["xml"].parse(text, [f])[0][0].arguments == values | {"number": 12, "numbers": ["1"]}
    assert SYNTAXES["xml"].parse(text)[0][0].arguments == values
    assert SYNTAXES["xml"].parse(SYNTAXES["xml"].render([ToolCall("find", {"name": "rab", "box": "many"})]), [find])[0][0].arguments["box"] == "many"


@pytest.mark.parametrize("text, calls, kind", [
    ("```json\n{}\n```", 0, TurnKind.RESPONSE), ("so ```python is``` it", 0, TurnKind.RESPONSE), ("```text\n```python\n```", 0, TurnKind.RESPONSE),
    ("```python\n1", 0, TurnKind.TEXT_POLLUTION), ("85\n```", 0, TurnKind.TEXT_POLLUTION), ("````python\n```\n````", 1, TurnKind.TOOL_CALL),
    ("```python\n```", 1, TurnKind.COLLAPSED), ("```python", 0, TurnKind.COLLAPSED)])
def test_fences_are_those_of_markdown(text, calls, kind):
    try: found = SYNTAXES["fenced"].parse(text)[0]
    except ValueError: found = []
    assert len(found) == calls and turn_kind(text, syntax="fenced") is kind


# Structural states

@given(text=WILD)
@example(text="<|observation|>")
@settings(max_examples=300, deadline=None)
def test_states_are_exhaustive_and_exclusive(text):
    for name in SYNTAXES:
        body = rest = text.split("<|im_end|>")[0].strip()
        for marker in sorted(SYNTAXES[name].markers, key=len, reverse=True): rest = rest.replace(marker.strip(), "")
        try: calls, content = SYNTAXES[name].parse(body)
        except ValueError: calls, content = None, ""
        empty, strewn = not rest.strip(), calls is None or any(a in content for a in ("tool_response>", "<|tool_response", "<|observation|>"))
        states = {TurnKind.COLLAPSED: empty, TurnKind.TEXT_POLLUTION: not empty and strewn, TurnKind.TOOL_CALL: not empty and not strewn and bool(calls),
                  TurnKind.RESPONSE: not empty and not strewn and not calls}
        assert sum(states.values()) == 1 and states[turn_kind(text, syntax=name)], name


@pytest.mark.parametrize("name", SYNTAXES)
def test_each_state_in_each_syntax(name):
    syntax, call = SYNTAXES[name], render_call(ToolCall("find", {"name": "rab", "box": 42}), name)
    kind = lambda text: turn_kind(text + "<|im_end|>", syntax=name)
    assert kind(call) is kind(f"I look.\n{call}\n{call}") is TurnKind.TOOL_CALL and kind("It is 85.") is TurnKind.RESPONSE
    assert kind("") is kind(syntax.markers[0]) is kind("".join(syntax.markers)) is TurnKind.COLLAPSED
    assert kind(call[:-1]) is kind(call + "\n</tool_response>") is kind("85" + syntax.markers[-1]) is TurnKind.TEXT_POLLUTION


# In tokens

@pytest.mark.parametrize("name", NAMES)
@given(before=st.lists(st.integers(0, 255), max_size=6), after=st.lists(st.integers(0, 286), max_size=12) | WILD.map(TOK.encode),
       argument=st.text(max_size=6))
@example(before=[], after=TOK.encode("\x1c\nx"), argument="a")
@settings(max_examples=100, deadline=None)
def test_a_turn_is_cut_right_behind_its_first_call(name, before, after, argument):
    format = make_format(name, TOK, [find])
    ids = before + TOK.encode("\n" + render_call(ToolCall("find", {"name": argument, "box": 42}), format.syntax)) + after
    cut, syntax = format.cut(ids), SYNTAXES[format.syntax]
    assert ids[:len(cut)] == cut
    if cut != ids:
        longer_fence = format.syntax == "fenced" and TOK.decode(cut[-1:]).strip() in ("`", "")   # a fence may be longer, and the rest of its line is blank
        assert syntax.end_of_call(TOK.decode(cut)) is not None and (longer_fence or syntax.end_of_call(TOK.decode(cut[:-1])) is None)
        assert format.cut(cut) == cut


@pytest.mark.parametrize("name", NAMES)
def test_only_what_says_something_is_dropped(name):
    format = make_format(name, TOK, [find])
    ids = TOK.encode("日本\n" + render_call(ToolCall("find", {"name": "日本", "box": 42}), format.syntax))
    for end in ([], [TOK.eos_token_id], TOK.encode("\n") + [TOK.eos_token_id]): assert format.cut(ids + end) == ids + end
    for more in ("\nand then", "\n" + TOK.decode(ids), "\n<tool_call>", "\n\U0001f40d<|im_end|>"): assert format.cut(ids + TOK.encode(more)) == ids
    assert format.cut([]) == [] and format.cut(ids[:-1]) == ids[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_that_was_stopped_gets_its_end_with_the_answer(name):
    format, results = make_format(name, TOK, [find]), [ToolResult("find", "k17"), ToolResult("find", "k18")]
    assert format.observe(results, ended=False) == [TOK.eos_token_id] + format.observe(results)
    turn = TOK.encode(render_call(ToolCall("find", {"name": "rab", "box": 42}), format.syntax))
    assert not format.ends(turn) and not format.ends([]) and format.ends(turn + [TOK.eos_token_id])
    assert format.parse(turn, []) == format.parse(turn + [TOK.eos_token_id], [])
    for stop in format.stop_strings: assert TOK.decode(turn).endswith(stop) and TOK.decode(turn).count(stop) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_marker_has_its_tokens(name):
    format = make_format(name, TOK, [])
    found = format.control_ids()
    assert list(found) == [*SYNTAXES[format.syntax].markers, "<|im_end|>"] and all(TOK.decode(ids) == marker for marker, ids in found.items())


def test_a_marker_that_cannot_be_spelled_is_named():
    words = Tokenizer(models.WordLevel({"<tool_call>": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="</tool_call>"):
        control_ids(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>"))


# Conversations

CALL = {"type": "function", "function": {"name": "find", "arguments": {"name": "rab", "box": 42}}}
HISTORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Box 42 of rab?"},
           {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
           {"role": "tool", "name": "find", "content": "k17"}, {"role": "tool", "name": "find", "content": "k18"}]


@pytest.mark.parametrize("name", SYNTAXES)
def test_text_formats_need_no_tool_roles(name):
    format = TextFormat(TOK, [find], syntax=name)
    text = TOK.decode(format.prompt(HISTORY))
    assert text.startswith(f"<|im_start|>system\nBe brief.\n\n{SYNTAXES[name].describe([find])}<|im_end|>\n")
    assert f"<|im_start|>assistant\nI look.\n{render_call(ToolCall('find', {'name': 'rab', 'box': 42}), name)}<|im_end|>\n" in text
    told = "<tool_response>\nk17\n</tool_response>\n<tool_response>\nk18\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{told}<|im_end|>\n<|im_start|>assistant\n")
    assert "system" not in TOK.decode(TextFormat(TOK, syntax=name).prompt(HISTORY[1:2]))


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_template_without_a_system_role_tells_the_user(name):
    format = TextFormat(TOK, [find], syntax=name, chat_template=(TEMPLATES / "gemma.jinja").read_text())
    text = TOK.decode(format.prompt(HISTORY[:2]))
    assert f"<start_of_turn>user\nBe brief.\n\n{SYNTAXES[name].describe([find])}\n\nBox 42 of rab?<end_of_turn>" in text
    assert "k17" in TOK.decode(format.observe([ToolResult("find", "k17")]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("template", [None, "qwen2_5", "qwen2_5_training", "qwen3_training", "llama3_training"])
def test_going_on_from_tokens_is_rendering_anew(name, template):
    template = template and (TEMPLATES / f"{template}.jinja").read_text()
    if name == "chat" and template and "eot_id" in template: return      # its tool calls are not the tiny tokenizer's
    format, results = make_format(name, TOK, [find], template), [ToolResult("find", "k17")]
    prompt = format.prompt(HISTORY[:2])
    think = "<think>\n\n</think>\n\n" if template and "<think>" in template else ""
    end = TOK.eos_token * ("eot_id" not in str(template))
    turn = TOK.encode(think + render_call(ToolCall("find", {"name": "rab", "box": 42}), format.syntax) + end)
    message, calls, _ = format.parse(turn, prompt)
    assert calls == [ToolCall("find", {"name": "rab", "box": 42})]
    tail = format.observe(results)
    if think or "eot_id" in str(template): assert "k17" in TOK.decode(tail)
    else: assert prompt + turn + tail == format.prompt(HISTORY[:2] + [message, {"role": "tool", "name": "find", "content": "k17"}])


@pytest.mark.parametrize("name", NAMES)
def test_a_template_that_changes_the_past_is_an_error_that_names_the_fix(name):
    template = "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}<|im_end|>"
    with pytest.raises(ValueError, match="chat_template="):
        make_format(name, TOK, [find], template)
    with pytest.raises(ValueError, match="chat_template="):
        TextFormat(TOK, [find], template).observe([ToolResult("find", "k17")])


def test_a_template_without_an_end_token_gets_what_ends_its_turns():
    stop = TOK.encode("!")[0]
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}!\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    assert TOK.decode(observation_ids(TOK, [ToolResult("f", "1")], template, False, [stop])) == "!\ntool:1!\nassistant:"


def test_names_of_formats():
    with pytest.raises(ValueError, match="yaml.*chat.*json, xml, fenced, list"):
        make_format("yaml", TOK, [])
    with pytest.raises(ValueError, match="yaml.*json, xml, fenced, list"):
        render_call(ToolCall("f", {}), "yaml")
    assert make_format(None, TOK, [], (TEMPLATES / "qwen3_5_nothink.jinja").read_text()).syntax == "xml" and template_syntax(TOK.chat_template) == "json"
    assert make_format("chat", TOK, []) == ChatFormat(TOK)


def test_one_task_in_every_format():
    "Same rows, other renderers: the same calls, the same results, the same messages."
    rows = list(make_tasks("all", n=12))
    runs = {name: demonstrations(rows, TOK, formats={name: 1}) for name in NAMES}
    for ours, theirs in zip(runs["chat"] * len(NAMES), [t for run in runs.values() for t in run]):
        assert ours.calls == theirs.calls and ours.messages == theirs.messages
        assert [r.content for r in ours.results] == [r.content for r in theirs.results]
        assert [t.kind for t in theirs.turns] == [TurnKind.TOOL_CALL] * (len(theirs.turns) - 1) + [TurnKind.RESPONSE]
    assert all(t.messages[-1]["content"] == r["answer"] for t, r in zip(runs["list"], rows))


@pytest.mark.parametrize("before", ["", "I see.\n", "See [1] (and [2)]:\n"])
@pytest.mark.parametrize("name", NAMES)
def test_sampling_stops_at_the_end_of_the_first_call(name, before):
    "Where a turn ends at its first call, hardly a token behind it is sampled, in any syntax; what only looks like an end is passed."
    format, asked = make_format(name, TOK, [find]), []
    script = TOK.encode(before + render_call(ToolCall("find", {"name": "rab", "box": 42}), format.syntax) + "\nand" + " so on" * 50 + "<|im_end|>")
    prompt = format.prompt([{"role": "user", "content": "hi"}])

    async def generate(ids, sampling):
        body = script[len(ids) - len(prompt):] if len(ids) < len(prompt) + len(script) else TOK.encode("ok<|im_end|>")
        size, stop = cut_turn(body, [TOK.eos_token_id], TOK, sampling)
        asked.append(sampling.seed)
        return Sampled(body[:size], [-0.5] * size, stop)
    tools = {"find": lambda name, box: "k17"}
    done = asyncio.run(rollout(prompt, SimpleNamespace(generate=generate), tools, format, RolloutLimits(4000, first_call_only=True, tool_rounds=1), noise=(0, 1, 2)))
    turn = done.turns[0]
    assert [c.name for c in turn.calls] == ["find"] and TOK.decode(turn.ids).startswith(before) and len(turn.logprobs) == len(turn.ids)
    assert len(turn.ids) <= len(script) - 50 and len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_without_a_call_is_sampled_to_its_end(name):
    "Strings that may end a call do not end a turn that holds none; the limit of the turn holds over all its parts."
    format = make_format(name, TOK, [find])
    script, prompt = TOK.encode("x)] y\n```\nz)]\n``` done<|im_end|>"), [1, 2, 3]

    async def generate(ids, sampling):
        size, stop = cut_turn(script[len(ids) - 3:], [TOK.eos_token_id], TOK, sampling)
        return Sampled(script[len(ids) - 3:][:size], None, stop)
    for limit, stop in ((4000, StopReason.ANSWER), (len(script) - 3, StopReason.LENGTH)):
        done = asyncio.run(rollout(prompt, SimpleNamespace(generate=generate), {}, format, RolloutLimits(limit, first_call_only=True, malformed="stop")))
        assert done.completion_ids == script[:limit] and done.stop in (stop, StopReason.MALFORMED) and done.logprobs is None
