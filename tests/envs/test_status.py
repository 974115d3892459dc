"How an execution ended travels beside its text, from the sandbox to the reward."
import asyncio
import pickle

import pytest

from tirlab.core.trajectory import Observation, StopReason, ToolCall, Trajectory, Turn, TurnKind
from tirlab.envs.environments import PythonEnvironment, python_environment
from tirlab.rewards.outcome import call_failed, tool_rewards
from tirlab.rollout.calls import RolloutLimits, run_call
from tirlab.sandbox.executions import Execution, Limits, Status
from tirlab.sandbox.remote import answer_request, read_answer


def called(code, environment=PythonEnvironment):
    return asyncio.run(run_call(ToolCall("python", {"code": code}), {"python": environment().python}, RolloutLimits()))


def rollout(result):
    message = {"role": "assistant", "content": "", "tool_calls": []}
    return Trajectory([1], [Turn([2], message, TurnKind.TOOL_CALL, [], [result], [3])], StopReason.LENGTH)


@pytest.mark.parametrize("code, status", [("print('ValueError: as expected')", "ok"), ("1 / 0", "error"), ("import sys; sys.exit(3)", "error"), ("[0] * 10**10", "memory")])
def test_status_reaches_the_reward(code, status):
    t = rollout(called(code))
    answer = t.reward_messages[1]["content"]
    assert (answer.status, call_failed(answer), t.results[0].status) == (status, status != "ok", status)
    assert tool_rewards(t) == [0.1 * (status == "ok")] and t.reward_messages == t.messages and type(t.messages[1]["content"]) is str


@pytest.mark.parametrize("style", ["plain", "simpletir"])
def test_status_does_not_depend_on_the_words(style):
    backend = lambda code, limits: Execution("Error: none\n", "", Status.OK, 0.0, False)
    assert called("1", python_environment(style=style, backend=backend)).status == "ok"


def test_an_observation_is_text_that_can_be_pickled():
    said = Observation("85", "ok")
    assert said == "85" and str(said) == "85" and pickle.loads(pickle.dumps(said)).status == "ok" and Observation("85").status is None


def test_our_server_sends_the_status():
    for code, status in {"import os; os.abort()": Status.CRASHED, "[0] * 10**10": Status.MEMORY, "1 / 0": Status.ERROR, "1": Status.OK}.items():
        assert read_answer(answer_request({"code": code}), Limits()).status is status


@pytest.mark.parametrize("sent, status", [("crashed", Status.CRASHED), ("ok", Status.ERROR), ("lost", Status.ERROR), (7, Status.ERROR), (None, Status.ERROR)])
def test_a_status_that_does_not_fit_is_not_believed(sent, status):
    result = {"status": "Finished", "return_code": 1, "stdout": "", "stderr": "NameError: x", "execution_status": sent}
    assert read_answer({"status": "Failed", "run_result": result}, Limits()).status is status
