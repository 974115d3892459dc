"""MCP servers with the real client: stdio, HTTP and SSE, many sessions at once, servers that die, bad input, training. Runs with `make test-adapters`."""
import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.adapter
pytest.importorskip("mcp")

from ports import own_port                                                              # noqa: E402

from datasets import Dataset                                                            # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer                            # noqa: E402

from tirlab.adapters.mcp import list_tools, mcp_environment, result_text, tasks          # noqa: E402
from tirlab.adapters.mcp_sessions import Server, Session, client_loop                   # noqa: E402
from tirlab.all import TIRConfig, TIRTrainer, evaluate, open_run, tiny_policy          # noqa: E402
from tirlab.core.schemas import tool_schemas                                            # noqa: E402
from tirlab.core.trajectory import ToolCall, ToolError                                  # noqa: E402
from tirlab.rollout.calls import RolloutLimits, run_call, run_calls                     # noqa: E402

FILE = Path(__file__).with_name("mcp_server.py")
STDIO = f"{sys.executable} {FILE}"


@pytest.fixture(scope="module")
def shop(): return mcp_environment(STDIO, timeout=20)


@pytest.fixture
def opened(shop):
    environment = shop()
    environment.reset()
    yield environment
    environment._close()


def tools_of(environment): return {t.__name__: t for t in environment._tools()}


def call(environment, name, arguments=None, limits=RolloutLimits()):
    return asyncio.run(run_call(ToolCall(name, arguments or {}), tools_of(environment), limits))


def is_server(process):
    try: return process.status() != psutil.STATUS_ZOMBIE and any(str(FILE) in word for word in process.cmdline())
    except psutil.Error: return False


def servers(pid=None): return [p for p in psutil.Process(pid).children(recursive=True) if is_server(p)]


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(0.05)
    return true()


@contextmanager
def over_http(*more):
    port = own_port()
    process = subprocess.Popen([sys.executable, str(FILE), str(port), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def listens():
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", port)) == 0
    try:
        assert until(listens, 30)
        yield f"http://127.0.0.1:{port}/{more[0] if more else 'mcp'}", process, port
    finally: process.kill(); process.wait()


def test_tools_have_the_servers_schemas(shop):
    named = {s["function"]["name"]: s for s in tool_schemas(shop()._tools())}
    assert set(named) == {"put", "total", "basket", "slow", "fail", "crash", "environment"}
    put = named["put"]["function"]
    assert put["description"] == "Put something into the basket." and put["parameters"]["required"] == ["item"]
    assert {k: v["type"] for k, v in put["parameters"]["properties"].items()} == {"item": "string", "price": "number"}
    only = mcp_environment(STDIO, only=["total"])
    assert [t.__name__ for t in only()._tools()] == ["total"]


def test_a_session_has_state_and_belongs_to_one_rollout(shop):
    first, second = shop(), shop()
    first.reset(), second.reset()
    assert call(first, "put", {"item": "pear"}).content == "1 in the basket" and call(first, "put", {"item": "plum", "price": 2.5}).content == "2 in the basket"
    assert float(call(first, "total").content) == 3.5 and float(call(second, "total").content) == 0
    assert json.loads(call(first, "basket").content) == {"pear": 1.0, "plum": 2.5}
    first.reset()
    assert float(call(first, "total").content) == 0
    first._close(), second._close()
    assert until(lambda: not servers())


def test_errors_of_a_tool_are_read(opened):
    failed, wrong, unknown = call(opened, "fail", {"why": "closed"}), call(opened, "put", {"price": "much"}), call(opened, "steal")
    assert failed.error is ToolError.EXCEPTION and "no: closed" in failed.content
    assert wrong.error is ToolError.EXCEPTION and "item" in wrong.content
    assert unknown.error is ToolError.UNKNOWN


def test_a_slow_tool_times_out_and_the_session_goes_on(opened):
    opened._server = replace(opened._server, timeout=0.5)
    opened.reset()
    call(opened, "put", {"item": "pear"})
    late = call(opened, "slow", {"seconds": 60})
    assert late.error is ToolError.EXCEPTION and "0.5 seconds" in late.content
    limited = call(opened, "slow", {"seconds": 60}, RolloutLimits(tool_seconds=0.2))
    assert limited.error is ToolError.TIMEOUT
    assert float(call(opened, "total").content) == 1


def test_a_dead_server_is_started_again(opened):
    call(opened, "put", {"item": "pear"})
    died = call(opened, "crash")
    assert died.error is ToolError.EXCEPTION and "started again" in died.content
    assert float(call(opened, "total").content) == 0
    one, = servers()
    one.kill()
    between = call(opened, "total")
    assert between.error is ToolError.EXCEPTION and "started again" in between.content and float(call(opened, "total").content) == 0


def test_calls_of_one_turn_are_in_order_and_rollouts_overlap(shop):
    many = [shop() for _ in range(4)]
    for environment in many: environment.reset()
    async def everybody():
        turns = [ToolCall("slow", {"seconds": 0.5}), ToolCall("put", {"item": "a"}), ToolCall("total", {})]
        await asyncio.gather(*(run_calls([ToolCall("total", {})], tools_of(e), RolloutLimits()) for e in many))
        start = time.monotonic()
        found = await asyncio.gather(*(run_calls(turns, tools_of(e), RolloutLimits()) for e in many))
        return found, time.monotonic() - start
    found, seconds = asyncio.run(everybody())
    assert [[r.content for r in rs][:2] for rs in found] == [["after 0.5 s", "1 in the basket"]] * 4 and all(float(rs[2].content) == 1 for rs in found)
    assert seconds < 4 * 0.5
    for environment in many: environment._close()
    assert until(lambda: not servers())


def test_a_session_is_closed_with_its_environment(shop):
    environment = shop()
    environment.reset()
    call(environment, "total")
    assert servers()
    del environment
    assert until(lambda: not servers())


def test_environment_variables_reach_the_process():
    environment = mcp_environment(STDIO, env={"SHOP": "open"}, only=["environment"])()
    environment.reset()
    assert (call(environment, "environment", {"name": "SHOP"}).content, call(environment, "environment", {"name": "PYTHONUTF8"}).content) == ("open", "none")
    environment._close()


@pytest.mark.parametrize("more", [(), ("sse",)])
def test_http_is_the_same_and_reconnects(more):
    with over_http(*more) as (address, process, port):
        environment = mcp_environment(address, headers={"X-Test": "1"}, timeout=20)()
        environment.reset()
        assert call(environment, "put", {"item": "pear"}).content == "1 in the basket" and "no: closed" in call(environment, "fail", {"why": "closed"}).content
        process.kill(), process.wait()
        gone = call(environment, "total")
        assert gone.error is ToolError.EXCEPTION and ("lost" in gone.content or "reached" in gone.content)
        again = subprocess.Popen([sys.executable, str(FILE), str(port), *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try: assert until(lambda: call(environment, "total").error is None, 30)
        finally: again.kill(); again.wait()
        down = call(environment, "total")
        assert down.error is ToolError.EXCEPTION
        environment._close()
        with pytest.raises(ValueError, match="cannot be reached"): mcp_environment(address)


@pytest.mark.parametrize("address, more, match", [
    ("no-such-program", {}, "did not start"), (f"{sys.executable} -c 'exit(\"no database\")'", {}, "no database"), ("http://127.0.0.1:9/mcp", {}, "cannot be reached"),
    (STDIO, {"only": ["totl"]}, "nearest is total"), (" ", {}, "needs an address")])
def test_what_cannot_work_is_one_sentence(address, more, match):
    with pytest.raises(ValueError, match=match) as e: mcp_environment(address, **more)
    assert "\n" not in str(e.value)
    assert until(lambda: not servers())


def test_a_server_that_never_answers_is_given_up():
    with pytest.raises(ValueError, match="no answer within 1 seconds"): list_tools(Server(f"{sys.executable} -c 'import time; time.sleep(60)'", start_timeout=1))


def test_blocks_that_are_no_text_are_named():
    from mcp.types import CallToolResult, ImageContent, TextContent
    result = CallToolResult(content=[TextContent(type="text", text="a chart"), ImageContent(type="image", data="AA==", mimeType="image/png")])
    assert result_text(result.model_dump(mode="json", by_alias=True, exclude_none=True)) == "a chart\n(image image/png was left out: only text can be read)"


ROWS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Put {w} into the basket and say how many there are."}], "answer": "1"} for w in ("a pear", "a plum", "a nut", "a fig")])
STEPS = dict(per_device_train_batch_size=4, num_generations=2, max_completion_length=64, max_steps=2, learning_rate=1e-4, save_strategy="no", disable_tqdm=True, report_to="none", seed=1)


def test_two_steps_of_training(shop, tmp_path):
    "The real trainer, and the tiny policy with a demonstration in each group so that the server is called for sure."
    from tirlab.all import OffPolicy
    truth = [json.dumps({"name": "put", "arguments": {"item": "pear"}}), json.dumps({"name": "total", "arguments": {}})]
    rows = ROWS.add_column("ground_truth", [truth] * len(ROWS))
    def reward(completions, **_): return [float(any(m["role"] == "tool" and "in the basket" in m["content"] for m in c)) for c in completions]
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), **STEPS)
    trainer = TIRTrainer(tiny_policy(), [reward], args, rows, environment_factory=shop, supervision=[OffPolicy(per_group=1)])
    trainer.train()
    demonstrated = [t for t in trainer.batch.trajectories if t.origin == "demonstration"]
    assert demonstrated and all(t.results[0].content == "1 in the basket" and t.results[0].error is None for t in demonstrated)
    assert open_run(tmp_path / "run").status() == "finished" and until(lambda: not servers())


def test_evaluation(shop):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_policy()), AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
    found = evaluate(model, tokenizer, ROWS, shop, limits=RolloutLimits(completion_tokens=48))
    assert len(found.rewards) == 4 and until(lambda: not servers())


def test_tasks_are_rows_with_the_servers_tools():
    found = tasks(STDIO, n=2, rows=ROWS, only=["put"])
    assert len(found.rows) == 2 and [t.__name__ for t in found.environment()._tools()] == ["put"]
    with pytest.raises(ValueError, match="no tasks"): tasks(STDIO)


LEFT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell may have started the tests without it
from tirlab.adapters.mcp import mcp_environment
shop = mcp_environment(sys.argv[1])()
shop.reset()
import asyncio
print(asyncio.run({t.__name__: t for t in shop._tools()}["put"](item="pear")), flush=True)
while True: time.sleep(1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_server_outlives_the_process_that_started_it(number):
    process = subprocess.Popen([sys.executable, "-c", LEFT, STDIO], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout.readline() == "1 in the basket\n"
        theirs = servers(process.pid)
        assert len(theirs) == 1
        process.send_signal(number)
        process.wait(20)
        assert until(lambda: not any(map(is_server, theirs)))
    finally: process.kill(); process.wait(); process.stdout.close()


def test_clients_share_one_thread(shop):
    before, loop = len([t for t in psutil.Process().threads()]), client_loop()
    sessions = [Session(shop._server) for _ in range(3)]
    assert client_loop() is loop
    for s in sessions: s.close()
    for s in sessions: s.done.result(20)
    assert len(psutil.Process().threads()) <= before + 2 and not servers()
