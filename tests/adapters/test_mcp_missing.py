"""What can be said about MCP servers without the package."""
import sys

import pytest

from tirlab.adapters import mcp, mcp_sessions
from tirlab.adapters.mcp import connection_lost, inlined, mcp_environment, result_text, tool_schema
from tirlab.adapters.mcp_sessions import Server, reason


def test_a_missing_package_is_one_sentence_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ValueError, match="pip install mcp") as e: mcp_environment("python server.py")
    assert "\n" not in str(e.value)
    assert not list(mcp_sessions._alive)


def test_an_address_is_needed_and_tasks_need_rows():
    with pytest.raises(ValueError, match="needs an address"): mcp_environment("  ")
    with pytest.raises(ValueError, match="no tasks") as e: mcp.tasks("python server.py")
    assert e.value.field == "tasks"
    assert Server("https://a/mcp").over_http and not Server("python https_server.py").over_http


SELF = {"type": "object", "properties": {"node": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": {"properties": {"left": {"$ref": "#/$defs/Node"}}}}}


@pytest.mark.parametrize("tool, words", [
    ({"name": "plant", "inputSchema": SELF}, ("plant", "node", "itself")), ({"name": "two words"}, ("two words", "name")), ({"name": "x" * 65}, ("too long",)),
    ({"name": "f", "inputSchema": {"type": "array"}}, ("'f'", "array")),
    ({"name": "f", "inputSchema": {"properties": {"a": {"items": {"$ref": "https://example.com/schema"}}}}}, ("'f'", "'a'", "example.com")),
    ({"name": "f", "inputSchema": {"properties": {"a": {"$ref": "#/$defs/Gone"}}}}, ("'f'", "'a'", "Gone"))])
def test_a_schema_that_cannot_be_expressed_names_tool_and_part(tool, words):
    with pytest.raises(ValueError) as e: tool_schema(tool)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_a_schema_stands_as_it_is_given():
    given = {"type": "object", "properties": {"a": {"type": ["integer", "null"], "minimum": 1}, "b": {"anyOf": [{"type": "string"}, {"enum": [1, 2]}]}}, "required": ["a"],
             "additionalProperties": False}
    assert tool_schema({"name": "f", "inputSchema": given})["function"] == {"name": "f", "description": "", "parameters": given}
    assert tool_schema({"name": "f", "inputSchema": {"type": "object"}})["function"]["parameters"] == {"type": "object", "properties": {}}


def test_references_are_resolved_where_they_are_used():
    root = {"$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/B"}}, "B": {"type": "integer"}}}
    assert inlined({"$ref": "#/$defs/A", "description": "numbers"}, root) == {"type": "array", "items": {"type": "integer"}, "description": "numbers"}


def test_results_are_text():
    assert result_text({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}) == "a\nb"
    assert result_text({"content": [{"type": "text", "text": "a"}], "structuredContent": {"x": 1}}) == "a"
    assert result_text({"content": [], "structuredContent": {"x": "é"}}) == '{"x": "é"}'
    assert result_text({"content": [{"type": "resource", "resource": {"uri": "file:///a"}}]}) == "(resource file:///a was left out: only text can be read)"
    assert result_text({}) == ""


def test_which_errors_are_about_the_connection():
    class Answered(Exception):
        def __init__(self, code): super().__init__("no"); self.error = type("Data", (), {"code": code})
    assert connection_lost(ConnectionError()) and connection_lost(Answered(-32000)) and not connection_lost(Answered(-32602))
    assert not connection_lost(TimeoutError()) and not connection_lost(ValueError())
    assert reason(ExceptionGroup("several", [ExceptionGroup("one", [OSError("no\n  route")])])) == "no route" and reason(EOFError()) == "EOFError"
