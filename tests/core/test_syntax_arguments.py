"""Arguments of calls in every text syntax: where a call ends, what its values are, and what is refused with a sentence."""

import asyncio
import functools
import typing
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from future_tools import Environment, typed as text_typed
from hypothesis import given, settings
from hypothesis import strategies as st

from tirlab.rollout.engines import Sampled, Sampling
from tirlab.rollout.loop import _sample_turn
from tirlab.core.syntax import SYNTAXES, Unfinished, call_arguments
from tirlab.core.trajectory import ToolCall

JSON, XML, FENCED, LIST = (SYNTAXES[n] for n in ("json", "xml", "fenced", "list"))


def call(arguments, name="python"): return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
def xml(*parameters, name="f"): return f"<tool_call>\n<function={name}>\n" + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters) + "</function>\n</tool_call>"


# Arguments that are no object

@pytest.mark.parametrize("arguments", ['"{\\"code\\": \\"1+1\\"}"', '{"code": "1+1"}', '"\\n {\\"code\\":\\"1+1\\"} "'])
def test_arguments_may_be_json_text(arguments):
    assert JSON.parse(call(arguments))[0] == [ToolCall("python", {"code": "1+1"})]


@pytest.mark.parametrize("arguments, kind", [("[1]", "a list"), ("7", "a number"), ("1.5", "a number"), ("true", "true or false"), ("null", "null"), ('"[1]"', "a list"),
                                             ('"\\"code\\""', "a text"), ('"7"', "a number")])
def test_arguments_that_are_no_object_are_refused_with_a_sentence(arguments, kind):
    with pytest.raises(ValueError, match=f'"arguments" must be an object .*not {kind}$'): JSON.parse(call(arguments))


@pytest.mark.parametrize("arguments", ['"1+1"', '""', '"{\\"code\\": NaN}"', '"{\\"code\\": 1"'])
def test_arguments_that_are_other_text_are_refused_with_a_sentence(arguments):
    with pytest.raises(ValueError, match="not JSON data: "): JSON.parse(call(arguments))


def test_arguments_of_a_call_can_be_read_by_themselves():
    assert call_arguments({"a": 1}) == call_arguments('{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="not a list"): call_arguments([1])


# Where a call ends

INSIDE = ["</tool_call>", "<tool_call>", "print('</tool_call>')\n", "<tool_call></tool_call>", "```python\n1\n```", "\n```\n", ")]", "[f(a=1)]", "'''", '"""', "\\", "'\n'", "<|im_end|>"]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", SYNTAXES)
def test_what_stands_in_an_argument_does_not_end_a_call(name, inside):
    syntax, two = SYNTAXES[name], [ToolCall("python", {"code": f"a = {inside}!"}), ToolCall("find", {"name": inside, "box": 1})]
    text = syntax.render(two)
    back, beside = syntax.parse(f"Well. {text} So." if name != "fenced" else f"Well.\n{text}\nSo.", [python, find])
    assert back == two and beside.split() == ["Well.", "So."]
    end = syntax.end_of_call(text)
    assert syntax.parse(text[:end], [python, find])[0] == (two if name == "list" else two[:1])
    for n in range(end):
        assert syntax.end_of_call(text[:n]) is None
        if any(text[:n].endswith(s) for s in syntax.stop_strings): assert syntax.goes_on(text[:n])
    assert not syntax.goes_on(text[:end])


def python(code: str): ...
def find(name: str, box: int): ...


@pytest.mark.parametrize("code", ["print('</tool_call>')", "<tool_call>", "</tool_call>", '{\\"name\\": 1}</tool_call>'])
def test_valid_json_decides_where_a_call_ends_as_models_write_it(code):
    text = call(f'{{"code": "{code}"}}')
    assert JSON.parse(text + "\nand")[0][0].arguments == {"code": code.replace('\\"', '"')} and JSON.end_of_call(text + "\nand") == len(text)
    for n in range(len("<tool_call>"), len(text)):
        with pytest.raises(Unfinished): JSON.parse(text[:n])      # an unfinished call is never a call


BROKEN = {"json": ["<tool_call>\n{python}\n</tool_call>", '<tool_call>\n{"name": "f"} and\n</tool_call>', "</tool_call>", "<tool_call></tool_call>", call("[1]"),
                   '<tool_call>\n{"name": "f", "arguments": {"code": "1}}\n</tool_call>', "<tool_call>" * 2 + "</tool_call>"],
          "xml": ["</tool_call>", "<tool_call></tool_call>", "<tool_call>\n<function=f>\n1\n</function>\n</tool_call>", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function>\n</tool_call>",
                  xml(("a", 1), ("a", 2)), "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</tool_call>"],
          "fenced": ["```tool_code\nf(1)\n```", "```tool_code\nf(a=b)\n```", "```tool_code\nf(a=1), g()\n```"],
          "list": ["[f(a=b)]", "[f(a=1, 2)]", "[f(a=1, a=2)]"]}
CUT = {"json": ["<tool_call>", "<tool_call>\n{", call('{"code": "1+1"}')[:-12], call('{"code": "1+1"}')[:-5], '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>', '<tool_call>{"name": "f", "arguments": {"a": 1']
       , "xml": ["<tool_call>", "<tool_call>\n<function=f", xml(("a", 1))[:-12], xml(("a", 1))[:-30], "<tool_call>\n<function=f>\n<parameter=a>\n</tool_call>"],
       "fenced": ["```python\n1", "```tool_code\nf(", "````python\n```"], "list": ["[f(a=", "[f(a='x)]", "[f(a='''it's)]", "[f(a=\"x)]", "[f(a=[1, (2)]"]}


@pytest.mark.parametrize("name, text", [(n, t) for n, ts in BROKEN.items() for t in ts])
def test_what_is_broken_for_good_ends_the_turn(name, text):
    with pytest.raises(ValueError, match=r"\w+ \w+") as error: SYNTAXES[name].parse(text)
    assert not isinstance(error.value, Unfinished) and not SYNTAXES[name].goes_on(text) and "0x" not in str(error.value)


@pytest.mark.parametrize("name, text", [(n, t) for n, ts in CUT.items() for t in ts])
def test_an_unfinished_call_is_no_call_and_may_go_on(name, text):
    with pytest.raises(Unfinished): SYNTAXES[name].parse(text)
    assert SYNTAXES[name].goes_on(text) and SYNTAXES[name].end_of_call(text) is None


@given(text=st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": "', '"}}', "{", "}", '"', "\\", "\n", "<function=f>", "<parameter=a>", "</parameter>", "</function>", "1. ", "- ",
                                      "   ", "```python", "```", "[f(a=", "'", ")]", "x"]), max_size=14).map("".join))
@settings(max_examples=400, deadline=None)
def test_a_complete_first_call_ends_the_turn_in_any_text(text):
    for syntax in SYNTAXES.values():
        end = syntax.end_of_call(text)
        assert end is None or not syntax.goes_on(text) and syntax.end_of_call(text[:end]) == end


@pytest.mark.parametrize("syntax, text", [("json", call('{"code": "print(\'</tool_call>\')"}')), ("xml", xml(("code", "print('</tool_call>')"), name="python")), ("list", "[python(code='f(x[(1)])')]")])
def test_a_stop_string_inside_an_argument_does_not_end_a_turn(syntax, text):
    class Format:
        def goes_on(self, ids, prefix): return SYNTAXES[syntax].goes_on("".join(ids))

    class Engine:      # a letter is a token; stops where an engine would
        async def generate(self, ids, sampling):
            wrote = next(n for n in range(len(ids) + 1, len(text) + 1) if any(text[:n].endswith(s) for s in SYNTAXES[syntax].stop_strings))
            return Sampled(list(text[len(ids):wrote]), [0.0] * (wrote - len(ids)), "end")

    assert "".join(asyncio.run(_sample_turn(Engine(), [], Sampling(200), Format(), None)).ids) == text


# Values in XML

def typed(text: str, number: int, share: float, yes: bool, numbers: list[int], table: dict[str, int], maybe: Optional[int], words: str | None, either: Union[int, str],
          level: Literal[1, 2, 3], name: Literal["1", "two"], noted: Annotated[int, "how many"], anything: Any, colour: set, lost: complex, bare, pair: tuple[int, ...]): ...


def wrapped():
    @functools.wraps(text_typed)
    def inner(*args, **kwargs): ...
    return inner


SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"properties": {
    "text": {"type": "string"}, "number": {"type": "integer"}, "share": {"type": "number"}, "yes": {"type": "boolean"}, "numbers": {"type": "array", "items": {"type": "integer"}},
    "table": {"type": "object", "additionalProperties": {"type": "integer"}}, "maybe": {"type": ["integer", "null"]}, "words": {"type": "string", "nullable": True},
    "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "level": {"type": "integer", "enum": [1, 2, 3]}, "name": {"enum": ["1", "two"]}, "noted": {"type": "integer", "description": "how many"},
    "anything": {}, "colour": {"$ref": "#/$defs/Colour"}, "lost": {"oneOf": [{"type": "object"}, {"type": "integer"}]}, "pair": {"type": "array"}}}}}
READ = [("text", "12", "12"), ("text", "null", "null"), ("text", " [1] ", " [1] "), ("number", "12", 12), ("number", "1,000", "1,000"), ("number", "1.0", "1.0"), ("number", "true", "true"), ("number", "many", "many"),
        ("number", "null", "null"), ("share", "1.5", 1.5), ("share", "2", 2), ("share", "True", "True"), ("yes", "true", True), ("yes", "False", False), ("yes", "1", "1"), ("numbers", "[1, 2]", [1, 2]),
        ("numbers", "1,000", "1,000"), ("numbers", "1, 2", "1, 2"), ("numbers", "(1, 2)", [1, 2]), ("numbers", '["1"]', '["1"]'), ("numbers", "{}", "{}"), ("numbers", "5", "5"), ("table", '{"a": 1}', {"a": 1}),
        ("table", "{'a': 1}", {"a": 1}), ("table", '{"a": "b"}', '{"a": "b"}'), ("table", "[1]", "[1]"), ("maybe", "7", 7), ("maybe", "null", None), ("maybe", "None", None), ("maybe", "x", "x"), ("words", "7", "7"),
        ("words", "null", None), ("words", "nullable", "nullable"), ("either", "7", "7"), ("level", "2", 2), ("level", "9", "9"), ("level", "2.0", "2.0"), ("level", "true", "true"), ("name", "1", "1"), ("name", "two", "two"),
        ("name", "three", "three"), ("noted", "3", 3), ("anything", "[1]", [1]), ("anything", "word", "word"), ("bare", "7", "7"), ("unknown", "7", "7"), ("pair", "(1, 2)", [1, 2]), ("lost", "7", 7)]


@pytest.mark.parametrize("tool", [typed, text_typed, wrapped(), SCHEMA, SCHEMA["function"]], ids=["hints", "hints as text", "wrapped", "schema", "bare schema"])
@pytest.mark.parametrize("key, text, value", READ)
def test_xml_values_follow_the_declared_type(tool, key, text, value):
    name = "f" if isinstance(tool, dict) else "typed"
    back = XML.parse(xml((key, text), name=name), [tool])[0][0].arguments[key]
    assert back == value and type(back) is type(value)


def test_xml_values_of_a_bound_method_and_of_what_names_nothing():
    parse = lambda key, text, tool: XML.parse(xml((key, text), name=tool.__name__), [tool])[0][0].arguments[key]
    assert parse("steps", "[1]", Environment().go) == [1] and parse("steps", "null", Environment().go) is None and parse("fast", "true", Environment().go) is True
    assert parse("number", "12", text_typed) == 12      # although another parameter's type cannot be found
    assert parse("colour", "red", text_typed) == "red"
    with pytest.raises(NameError): typing.get_type_hints(text_typed)


# Calls in Python

@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("false", False), ("null", None), ("None", None), ("[true, {'a': null}]", [True, {"a": None}]), ("'true'", "true"), ("-1.5", -1.5)])
@pytest.mark.parametrize("syntax, form", [("list", "[f(a={})]"), ("fenced", "```tool_code\nf(a={})\n```")])
def test_python_calls_take_names_of_both_languages(syntax, form, text, value):
    assert SYNTAXES[syntax].parse(form.format(text))[0] == [ToolCall("f", {"a": value})]


@pytest.mark.parametrize("quote", ["'", '"', "'''", '"""'])
@pytest.mark.parametrize("syntax, form", [("list", "[python(code={})]"), ("fenced", "```tool_code\npython(code={})\n```")])
@pytest.mark.parametrize("code, value", [("a = 1\nprint(a)", "a = 1\nprint(a)"), ("f([\n(1)]\n)", "f([\n(1)]\n)"), ("a\\\\\nb", "a\\\nb"), ("a\\nb\nc", "a\nb\nc"), ("\n", "\n"), ("a\\\nb", "ab")])
def test_a_line_break_in_a_string_is_read(syntax, form, quote, code, value):
    assert SYNTAXES[syntax].parse(form.format(f"{quote}{code}{quote}"))[0] == [ToolCall("python", {"code": value})]


@pytest.mark.parametrize("argument, words", [("1+1", "'a' must be a plain value"), ("x", "'a' must be a plain value"), ("true()", "'a' must be a plain value"), ("r'a\nb'", "not a call in Python: unterminated"),
                                             ("{1}", "'a' must be a plain value"), ("1e999", "'a' must be a plain value")])
@pytest.mark.parametrize("syntax, form", [("list", "[f(a={})]"), ("fenced", "```tool_code\nf(a={})\n```")])
def test_what_is_no_value_is_refused_with_a_sentence(syntax, form, argument, words):
    with pytest.raises(ValueError, match=words) as error: SYNTAXES[syntax].parse(form.format(argument))
    assert "0x" not in str(error.value)


# Blocks in lists

CODE = "x = 1\nif x:\n    print(x)"


@pytest.mark.parametrize("before, indent", [("1. do\n", 3), ("10) do\n", 4), ("- do\n", 2), ("*   do\n", 4), ("1. do\n   - so\n", 5), ("- a\n- b\n\n", 2), ("1. do\n\n   text\n\n", 3), ("1. do\n", 5), ("", 0), ("", 3), ("text\n", 2)])
@pytest.mark.parametrize("name, code", [("python", CODE), ("tool_code", "f(a=1)")])
def test_a_block_under_a_list_item_loses_its_indent(before, indent, name, code):
    lines = [f"```{name}", *code.split("\n"), "```"]
    text = before + "\n".join(" " * indent + line for line in lines)
    calls, beside = FENCED.parse(text + "\nso")
    assert calls == [ToolCall("python", {"code": code}) if name == "python" else ToolCall("f", {"a": 1})]
    assert FENCED.end_of_call(text + "\nso") == len(text) and beside.split() == [*before.split(), "so"]
    assert FENCED.parse(text + "\n2. more\n" + text)[0] == calls * 2


@pytest.mark.parametrize("text, code", [
    ("- ```python\n  x = 1\n  ```", "x = 1"), ("1. do\n   ```python\n   x = 1\n```", "x = 1"), ("1. do\n   ```python\n\n   x = 1\n\n   ```", "\nx = 1\n"),
    ("1. do\n   ```python\n     x\n y\n   ```", "  x\ny"), ("   ```python\n  x\n   ```", "x"), ("1. do\n\nso\n   ```python\n   x\n   ```", "x")])
def test_blocks_are_indented_as_markdown_says(text, code):
    assert FENCED.parse(text)[0] == [ToolCall("python", {"code": code})]


@pytest.mark.parametrize("text", ["    ```python\n    x\n    ```", "1. do\n        ```python\n        x\n        ```", "1. do\n\nso\n    ```python\n    x\n    ```", "so 1. do\n    ```python\n    x\n    ```"])
def test_what_markdown_takes_for_indented_text_is_no_block(text):
    assert FENCED.parse(text) == ([], text) and FENCED.end_of_call(text) is None
