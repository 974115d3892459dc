"""Environments of OpenEnv, by its own server on this machine, and a tirlab environment as such a server."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from asking_shop import Shop
from datasets import Dataset
from scripted_endpoint import call, scripted

from tirlab.core.settings import SettingError
from tirlab.core.trajectory import StopReason
from tirlab.eval.evaluate import evaluate
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.endpoint import Endpoint

pytestmark = pytest.mark.adapter
PACKAGES = str(Path(__file__).parent / "packages")
WIDE = RolloutLimits(completion_tokens=2**20, observation_chars=None)


@contextmanager
def served(app):
    "Serve an app on a free port of this machine."
    import uvicorn
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error", timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.02)
    try: yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(5)


def vault(sessions=16):
    "The app of `packages/oe_vault.py`."
    sys.path.insert(0, PACKAGES)
    try: from oe_vault import vault as make
    finally: sys.path.remove(PACKAGES)
    return make(sessions)


def by_number(**scripts):
    "Choose a script by the number in the first message."
    return lambda messages: next(s for k, s in scripts.items() if f"number {k[1:]}." in str(messages[0]["content"]))


def run(tasks, url, **options): return evaluate(None, None, tasks.rows, tasks.environment, tasks.rewards or None, engine=Endpoint(url, "m", None, pause=0.01), limits=WIDE, **options)


def test_the_action_is_a_tool_and_done_ends_the_rollout():
    from tirlab.adapters.openenv import tasks
    turn, seen = lambda **a: [call("step", **a)], []
    scripts = by_number(n3=[turn(way="left", digit=3), turn(way="right", digit=5), "never asked"], n4=[turn(way="up", digit=4), turn(way="left", digit=4, note="crash"), turn(way="left", digit=1), "I give up."])
    with served(vault()) as server, scripted(scripts, seen) as url:
        found = tasks(server, n=2, seed=3)
        done = run(found, url)
    parameters = seen[0]["tools"][0]["function"]["parameters"]
    assert parameters["properties"]["way"] == {"enum": ["left", "right"], "type": "string"} and parameters["required"] == ["way", "digit"] and "metadata" not in parameters["properties"]
    assert seen[0]["tools"][0]["function"]["description"] == "Turn the dial." and {b["messages"][0]["content"].rsplit("\n\n")[-1] for b in seen} == {"A vault, number 3.", "A vault, number 4."}
    first, second = done.trajectories
    assert (first.stop, [r.content for r in first.results]) == (StopReason.DONE, ["click", "open right"]) and first.messages[-1]["role"] == "tool"
    assert second.stop is StopReason.ANSWER and [bool(r.error) for r in second.results] == [True, True, False] and "the dial is stuck" in second.results[1].content
    assert done.rewards == [0.5, -0.1] and done.by_function == {"OpenEnvEnvironment": [0.5, -0.1]}


def test_rewards_are_of_the_last_step_or_of_all():
    from tirlab.adapters.openenv import tasks
    with served(vault()) as server, scripted(by_number(n3=[[call("step", way="left", digit=d)] for d in (1, 3, 5)])) as url:
        assert [run(tasks(server, n=1, seed=3, reward=r), url).rewards for r in ("last", "sum")] == [[pytest.approx(1 / 3)], [pytest.approx(-0.1 + 0.25 + 1 / 3)]]
        with pytest.raises(SettingError, match="last or sum"): tasks(server, reward="mean")


def echo():
    "An app whose action is a message."
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Say(Action): message: str

    class Heard(Observation):
        echoed: str = ""
        count: int = 0

    class Echo(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        def reset(self, seed=None, episode_id=None, **options): self.count = 0; return Heard(echoed=f"number {seed}.")
        def step(self, action, timeout_s=None, **options): self.count += 1; return Heard(echoed=action.message.upper(), count=self.count, reward=len(action.message) / 10, done=action.message == "bye")
        @property
        def state(self): return State()
    return create_fastapi_app(Echo, Say, Heard, max_concurrent_envs=16)


def test_words_are_actions():
    from tirlab.adapters.openenv import tasks
    seen = []
    with served(echo()) as server, scripted(by_number(n0=["hello", "there", "bye"]), seen) as url:
        done = run(tasks(server, n=1, action_field="message", text_field="echoed"), url)
        shown = run(tasks(server, n=1, action_field="message"), url).trajectories[0].messages[1]["content"]
        with pytest.raises(SettingError, match="have no field 'text'; they have message"): tasks(server, action_field="text")
    assert [m["content"] for m in done.trajectories[0].messages] == ["hello", "HELLO", "there", "THERE", "bye"] and "tools" not in seen[0]
    assert seen[0]["messages"] == [{"role": "user", "content": "number 0."}] and done.rewards == [pytest.approx(0.3)] and json.loads(shown) == {"echoed": "HELLO", "count": 1}


def mcp_app():
    "An app whose environment serves MCP tools."
    from fastmcp import FastMCP
    from openenv.core.env_server import CallToolAction, CallToolObservation, Observation, State, create_fastapi_app
    from openenv.core.env_server.mcp_environment import MCPEnvironment

    class Calculator(MCPEnvironment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        def __init__(self):
            server = FastMCP("calculator")

            @server.tool()
            def add(a: int, b: int) -> int:
                "Add two numbers."
                return a + b

            @server.tool()
            def fail(why: str) -> str:
                "Fail."
                raise ValueError(why)
            super().__init__(server)

        def reset(self, seed=None, episode_id=None, **options): return Observation(metadata={"message": "ready"})
        def _step_impl(self, action, timeout_s=None, **options): raise NotImplementedError
        @property
        def state(self): return State()
    return create_fastapi_app(Calculator, CallToolAction, CallToolObservation, max_concurrent_envs=16)


def test_mcp_tools_of_an_environment_are_tools():
    from tirlab.adapters.openenv import tasks
    seen = []
    with served(mcp_app()) as server, scripted(lambda m: [[call("add", a=2, b=3)], [call("fail", why="no luck")], [call("add", a="x", b=1)], "5"], seen) as url:
        done = run(tasks(server, n=1), url)
    results = done.trajectories[0].results
    assert [t["function"]["name"] for t in seen[0]["tools"]] == ["add", "fail"] and seen[0]["tools"][0]["function"]["parameters"]["required"] == ["a", "b"]
    assert results[0].content == "5" and "no luck" in results[1].content and [bool(r.error) for r in results] == [False, True, True] and done.trajectories[0].stop is StopReason.ANSWER


def test_a_server_that_is_down_or_none_of_openenv_is_one_sentence():
    from tirlab.adapters.openenv import tasks
    with served(vault()) as server: assert len(tasks(server).rows) == 64
    with pytest.raises(SettingError, match="No OpenEnv server answers at .*start it first"): tasks(server)
    with scripted(lambda m: ["x"]) as url, pytest.raises(SettingError, match="not as an OpenEnv server|describes no action"): tasks(url)
    with pytest.raises(SettingError, match="named by its address"): tasks("echo_env")
    with served(vault()) as server, pytest.raises(SettingError, match="no split 'test'"): tasks(server, "test")


def test_a_schema_that_contains_itself_is_refused():
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
    from tirlab.adapters.openenv import tasks
    from typing import Optional

    class Node(Action): next: Optional["Node"] = None
    Node.model_rebuild(_types_namespace={"Node": Node})

    class Deep(Environment):
        def reset(self, **options): return Observation()
        def step(self, action, **options): return Observation()
        @property
        def state(self): return State()
    with served(create_fastapi_app(Deep, Node, Observation)) as server, pytest.raises(SettingError, match="cannot be a tool: .*contains itself"): tasks(server)


def test_a_server_without_room_says_what_to_do():
    from tirlab.adapters.openenv import tasks
    with served(vault(1)) as server, scripted(lambda m: ["x"]) as url:
        found = tasks(server, n=3)
        with pytest.raises(ValueError, match="max_concurrent_envs"): run(found, url)
        gc.collect()   # the first session ends with its object
        time.sleep(0.5)
        assert run(found, url, batch_size=1).rewards == [0.0] * 3


def test_a_rollout_whose_server_goes_away_is_dropped_with_the_reason():
    "The session is lost and with it the episode; the rollout is tried once more, and dropped."
    from tirlab.adapters.openenv import tasks
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    server, address = subprocess.Popen([sys.executable, f"{PACKAGES}/oe_vault.py", str(port)]), f"http://127.0.0.1:{port}"
    def wait():
        for _ in range(1200):
            try: socket.create_connection(("127.0.0.1", port), 0.2).close(); return
            except OSError: time.sleep(0.1)
    def choose(messages):
        if len(messages) > 1 and server.poll() is None: os.kill(server.pid, signal.SIGKILL); server.wait(10)
        return [[call("step", way="left", digit=3)]] * 9
    try:
        wait()
        found = tasks(address, n=2, seed=3, seconds=5)
        with scripted(choose) as url, pytest.warns(UserWarning, match="Every rollout failed.*was lost"): done = run(found, url)
    finally: server.kill(); server.wait(10)
    assert [t.stop for t in done.trajectories] == [StopReason.FAILED] * 2 and done.rewards == [None, None]
    assert all(f"the OpenEnv server {address} was lost" in t.error for t in done.trajectories)


def test_a_server_is_trained_on(tmp_path):
    from tirlab.adapters.openenv import tasks
    from tirlab.all import TIRConfig, TIRTrainer, tiny_policy
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=96, max_turn_length=16, max_steps=2, learning_rate=1e-3,
                     save_strategy="no", disable_tqdm=True, report_to="none")
    with served(echo()) as server:
        found = tasks(server, n=4, action_field="message", text_field="echoed", reward="sum")
        trainer = TIRTrainer(tiny_policy(), [], args, found.rows, environment_factory=found.environment)
        trainer.train()
    replies = [m["content"] for t in trainer.batch.trajectories for m in t.messages if m["role"] == "user"]
    assert replies and all(r == r.upper() for r in replies) and [e for e in trainer.state.log_history if e.get("rewards/OpenEnvEnvironment/mean", 0) > 0]


# ---- and back

def polite(completions, **row): return [1 / 3 if "please" in c[-1]["content"] else None for c in completions]
async def brief(completions, wants, **row): return [1 / len(c) for c in completions]


ROWS = Dataset.from_list([{"prompt": [{"role": "system", "content": "You sell."}, {"role": "user", "content": f"number {i}."}], "wants": w} for i, w in enumerate(("tea", "air", "milk"))])
SCRIPTS = dict(n0=[[call("sell", ware="tea")], "There.", "Yes, please."], n1=[[call("sell", ware="air")], [call("sell", ware="tea", number="x")], "No.", "No, please."], n2=["None.", [call("sell", ware="milk", number=2)], "Two."])


def choose(messages): return next(s for k, s in SCRIPTS.items() if f"number {k[1:]}." in next(m["content"] for m in messages if m["role"] == "user"))


def test_a_tirlab_environment_behind_an_openenv_server_reads_and_earns_the_same():
    from tirlab.adapters.openenv import tasks
    from tirlab.adapters.openenv_server import serve_openenv
    with serve_openenv(Shop, ROWS, [polite, brief], weights=[0.5, 2.0]) as server, scripted(choose) as url:
        found = tasks(server, answer_tool="answer")
        there = run(found, url)
        here = evaluate(None, None, ROWS, Shop, [polite, brief], engine=Endpoint(url, "m", None), limits=WIDE, reward_weights=[0.5, 2.0])
    assert [t.messages for t in there.trajectories] == [t.messages for t in here.trajectories] and sum(len(t.results) for t in here.trajectories) == 4
    assert there.rewards == pytest.approx(here.rewards, rel=1e-6) and len(set(here.rewards)) == 3
    assert [t["prompt"] for t in found.rows] == [r["prompt"] for r in ROWS]


def test_openenvs_own_client_plays_it():
    from openenv.core import GenericEnvClient
    from tirlab.adapters.openenv_server import serve_openenv
    with serve_openenv(Shop, ROWS, [polite, brief], weights=[0.5, 2.0]) as server, GenericEnvClient(server).sync() as client:
        first = client.reset(index=0)
        tools = client.step({"type": "list_tools"}).observation["tools"]
        sold, asked = (client.step({"type": "call_tool", "tool_name": n, "arguments": a}) for n, a in (("sell", {"ware": "tea"}), ("answer", {"text": "There."})))
        last = client.step({"type": "call_tool", "tool_name": "answer", "arguments": {"text": "Yes, please."}})
        with pytest.raises(RuntimeError, match="the episode is over"): client.step({"type": "call_tool", "tool_name": "sell", "arguments": {"ware": "tea"}})
        again = client.reset(seed=4).observation["text"]
    assert first.observation["text"] == " I want tea." and [t["name"] for t in tools] == ["sell", "answer"] and again == " I want air."
    assert (sold.observation["result"]["data"], sold.done, asked.observation["result"]["data"], asked.reward) == ("tea: 1 so far", False, "And a bag?", None)
    assert last.done and last.reward == pytest.approx(1.0 + 0.5 / 3 + 2.0 / 5)


def test_a_tool_called_answer_needs_another_name():
    from tirlab.adapters.openenv_server import openenv_app
    def answer(text: str) -> str: return text
    with pytest.raises(ValueError, match="another name"): openenv_app(Shop, ROWS, [polite], [answer])
    with pytest.raises(ValueError, match="2 numbers for 1"): openenv_app(Shop, ROWS, [polite], weights=[1, 2])
