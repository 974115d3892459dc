"""Adapters of verifiers and OpenEnv without their packages: one sentence with the line that installs them, and all that needs neither."""

import importlib.util
import json

import pytest
from datasets import Dataset

from tirlab.adapters import export, openenv, openenv_server, verifiers, verifiers_parts
from tirlab.adapters.background import in_background, wait_for
from tirlab.adapters.task_set import ADAPTERS, adapter_tasks
from tirlab.core.settings import SettingError
from tirlab.core.trajectory import StopReason
from tirlab.rollout.loop import run_async

lacking = {name: pytest.mark.skipif(importlib.util.find_spec(name) is not None, reason=f"{name} is installed") for name in ("verifiers", "openenv")}
ROWS = Dataset.from_list([{"prompt": [{"role": "user", "content": "x"}]}])


@pytest.mark.parametrize("name, ask", [
    pytest.param("verifiers", lambda: adapter_tasks("verifiers/wordle"), marks=lacking["verifiers"]),
    pytest.param("verifiers", lambda: export.as_verifiers(None, ROWS), marks=lacking["verifiers"]),
    pytest.param("openenv", lambda: adapter_tasks("openenv/http://127.0.0.1:9"), marks=lacking["openenv"]),
    pytest.param("openenv", lambda: openenv_server.openenv_app(None, ROWS), marks=lacking["openenv"])])
def test_a_missing_package_is_one_sentence_with_the_line_that_installs_it(name, ask):
    with pytest.raises(ValueError) as e: ask()
    assert ADAPTERS[name].install in str(e.value) and "\n" not in str(e.value) and ADAPTERS[name].module == name


def test_a_server_that_is_down_is_one_sentence():
    with pytest.raises(SettingError, match="start it first") as e: openenv.ask_server("http://127.0.0.1:9", "/schema")
    assert e.value.field == "tasks"


def test_schemas_lose_references_titles_and_metadata():
    schema = {"title": "A", "$defs": {"W": {"title": "W", "enum": ["l", "r"]}, "P": {"properties": {"title": {"type": "string", "title": "Title"}, "w": {"$ref": "#/$defs/W"}}}},
              "properties": {"metadata": {}, "where": {"$ref": "#/$defs/P", "description": "Where."}, "many": {"items": {"$ref": "#/$defs/W"}}}, "required": ["where", "metadata"], "additionalProperties": False}
    assert openenv.tool_schema("step", "Act.", schema)["function"]["parameters"] == {"type": "object", "required": ["where"], "properties": {
        "where": {"properties": {"title": {"type": "string"}, "w": {"enum": ["l", "r"]}}, "description": "Where."}, "many": {"items": {"enum": ["l", "r"]}}}}
    for wrong in ({"type": "string"}, {"anyOf": []}, {"$defs": {"N": {"items": {"$ref": "#/$defs/N"}}}, "properties": {"n": {"$ref": "#/$defs/N"}}}):
        with pytest.raises(ValueError): openenv.tool_schema("step", "Act.", wrong)


@pytest.mark.parametrize("observation, field, shown", [
    ({"text": "a"}, None, "a"), ({"text": "a", "metadata": {"b": 1}, "error": None}, None, "a"), ({}, None, ""), ({"n": 3}, None, '{"n": 3}'), ({"n": 3, "t": "ü"}, None, '{"n": 3, "t": "ü"}'),
    ({"n": {"t": "a"}}, "n.t", "a"), ({"n": [1]}, "n", "[1]")])
def test_observations_are_shown_as_text(observation, field, shown): assert openenv.observation_text(observation, field) == shown


def test_a_field_that_an_observation_lacks_is_named():
    with pytest.raises(ValueError, match="has no board; it has text"): openenv.observation_text({"text": ""}, "board")


@pytest.mark.parametrize("observation, shown", [({"result": "a"}, "a"), ({"result": [1]}, "[1]"), ({"result": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}, "a\nb"),
                                                ({"error": {"message": "no"}}, RuntimeError), ({"result": {"content": [{"type": "text", "text": "no"}], "is_error": True}}, RuntimeError)])
def test_results_of_mcp_tools_are_shown_as_text(observation, shown):
    if isinstance(shown, str): assert openenv.tool_text(observation) == shown
    else:
        with pytest.raises(shown, match="no"): openenv.tool_text(observation)


def test_messages_get_ids_and_text():
    call = lambda name, **a: {"type": "function", "function": {"name": name, "arguments": a}}
    out = verifiers_parts.typed_messages([{"role": "assistant", "content": None, "tool_calls": [call("a", x=1), call("b")]}, {"role": "tool", "name": "b", "content": "2"}, {"role": "tool", "name": "a", "content": [{"type": "text", "text": "1"}]},
                                          {"role": "tool", "name": "c", "content": "3"}, {"role": "assistant", "content": "", "tool_calls": [call("a")]}])
    assert [m.get("tool_call_id") for m in out] == [None, "call_1", "call_0", "", None] and out[2]["content"] == "1" and out[4]["tool_calls"][0]["id"] == "call_2"
    assert json.loads(out[0]["tool_calls"][0]["function"]["arguments"]) == {"x": 1}


def test_one_rollout_is_scored_as_a_batch_of_one():
    class Home:
        async def get_reward(self): return 2.0
    def first(prompts, completions, completion_ids, environments, answer, trainer_state, log_metric, **row): log_metric("m", 3); return [float(answer[0] == 4 and trainer_state.global_step == 1)]
    def nothing(**row): return [None]
    async def first_again(**row): return [float("nan")]
    first_again.__name__ = "first"
    from tirlab.core.trajectory import Trajectory
    recipe = export.Recipe(Home, [first, nothing, first_again], weights=[0.5, 1, 1])
    scored = run_async(lambda: export.score_rollout(recipe.rewards, {"answer": 4, "prompt": "x"}, "x", Trajectory([], [], StopReason.LENGTH), Home()))
    assert scored.values == {"first": 1.0, "Home": 2.0} and scored.metrics == {"m": 3.0} and export.weighted(scored, recipe) == 2.5
    assert export.weighted(export.Scored({}), recipe) is None


def test_what_runs_in_the_background_is_awaited_cancelled_and_raised():
    import asyncio
    seen = []
    async def slow():
        try: await asyncio.sleep(60)
        except asyncio.CancelledError: seen.append("cancelled"); raise
    async def wrong(): raise KeyError("gone")
    with pytest.raises(TimeoutError): wait_for(slow, 0.05)
    with pytest.raises(KeyError): wait_for(wrong)
    assert in_background(lambda: asyncio.sleep(0, 7)).result(5) == 7 and seen == ["cancelled"]


def test_rewards_of_other_environments_are_none():
    assert verifiers.rubric("r")(prompts=["x"], completions=[[]], environments=[object()]) == [None] and verifiers.parts_of([None]) == {}
