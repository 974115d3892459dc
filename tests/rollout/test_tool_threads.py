"""Tools and the threads that they run on: what belongs to the thread that made it runs there, in training and in evaluation, with and without a running event loop."""

import asyncio
import contextvars
import functools
import os
import signal
import sqlite3
import threading
import time
import warnings
from pathlib import Path

import pytest
from forks import ended, forked
from transformers import AutoModelForCausalLM, AutoTokenizer

from tirlab.all import TIRConfig, TIRTrainer, answer_reward, make_tasks, tiny_policy
from tirlab.rollout.calls import RolloutLimits, run_call, run_calls, wrong_thread
from tirlab.eval.evaluate import evaluate
from tirlab.rollout.loop import run_async
from tirlab.rollout.metrics import failing_tools
from tirlab.core.trajectory import StopReason, ToolCall, ToolError, ToolResult, Trajectory, Turn, TurnKind

SMALL = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=96, max_steps=1, learning_rate=1e-4, save_strategy="no", disable_tqdm=True, trace=False, seed=0)


class Sqlite:
    "A database made in `__init__` and a table made in `reset`; sqlite allows both on one thread only."

    def __init__(self):
        self.base, self.calls = sqlite3.connect(":memory:"), 0

    def reset(self, **row):
        self.log, self.calls = sqlite3.connect(":memory:"), 0
        self.log.execute("create table calls (code text)")

    def python(self, code: str) -> str:
        """
        Work out an expression.

        Args:
            code: An expression.
        """
        self.calls += 1   # before the database is used: a call that is made twice is seen
        self.log.execute("insert into calls values (?)", (code,))
        return str(self.base.execute(f"select {code}").fetchone()[0])

    def get_reward(self):
        return float(self.log.execute("select count(*) from calls").fetchone()[0] == self.calls)


class Alarm:
    "Limits its time by a signal, which only the main thread may do."
    calls = done = 0

    def reset(self, **row):
        self.calls = self.done = 0

    def python(self, code: str) -> str:
        """
        Work out an expression.

        Args:
            code: An expression.
        """
        before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 60)
        self.calls += 1
        try: return str(eval(code, {"__builtins__": {}}))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.done += 1

    def get_reward(self):
        return float(self.calls == self.done)


def called_from(running, work):
    "The result of some work, called from inside a running event loop or from outside of any."
    async def inside(): return work()
    return asyncio.run(inside()) if running else work()


def read_by(environments):
    "A reward that asks the environments, which TRL hands to rewards; it remembers what they said."
    asked = []
    def reads(completions, environments=None, **kwargs):
        asked.append(environments is not None)
        return [e.get_reward() for e in environments] if environments else [1.0] * len(completions)
    return reads, asked


@pytest.mark.parametrize("workers", [32, 1])
@pytest.mark.parametrize("running", [False, True], ids=["no loop", "running loop"])
@pytest.mark.parametrize("environment", [Sqlite, Alarm])
def test_tools_bound_to_a_thread_train(environment, running, workers, tmp_path):
    "`reset`, tools, `get_reward` and a reward that reads `environments`, as with TRL's trainer: no call fails for its thread."
    made = type(environment.__name__, (environment,), {})   # a class that no test before has met
    reads, asked = read_by(made)
    args = TIRConfig(output_dir=str(tmp_path), max_concurrent_tools=workers, **SMALL)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*tool calls of the first batch failed")
        def work():
            t = TIRTrainer(tiny_policy(), [answer_reward, reads], args, make_tasks("arithmetic", n=8), environment_factory=made)
            t.train()
            return t
        t = called_from(running, work)
    results = [r for x in t.batch.trajectories for r in x.results if r.error not in (ToolError.UNKNOWN, ToolError.MALFORMED)]
    assert len(results) >= 4 and not [r.content for r in results if "thread" in r.content] and any(r.error is None for r in results)
    assert asked == [True] and all(e.get_reward() == 1 for e in t.environments)


@pytest.mark.parametrize("running", [False, True], ids=["no loop", "running loop"])
@pytest.mark.parametrize("environment", [Sqlite, Alarm])
def test_tools_bound_to_a_thread_evaluate(environment, running):
    made = type(environment.__name__, (environment,), {})
    reads, _ = read_by(made)
    model, tok = AutoModelForCausalLM.from_pretrained(tiny_policy()).eval(), AutoTokenizer.from_pretrained(tiny_policy())
    found = called_from(running, lambda: evaluate(model, tok, make_tasks("arithmetic", "test", 16), made, reads, limits=RolloutLimits(96)))
    results = [r for t in found.trajectories for r in t.results if r.error not in (ToolError.UNKNOWN, ToolError.MALFORMED)]
    assert len(results) >= 4 and not [r.content for r in results if "thread" in r.content] and any(r.error is None for r in results)
    assert found.rewards == [2.0] * 16   # what `get_reward` says, and a reward function that reads the environment


def test_what_a_bound_tool_does_is_done_once():
    "Calls that wait while another one finds out that the class is bound are not begun elsewhere either."
    class Ledger:
        def __init__(self): self.lines, self.db = [], sqlite3.connect(":memory:")
        def add(self, name: str) -> str:
            self.lines.append(name)
            time.sleep(0.01)
            return str(self.db.execute("select 1").fetchone())
    ledgers, slots = [Ledger() for _ in range(12)], {}
    async def go():
        slots[0] = asyncio.Semaphore(3)
        return await asyncio.gather(*(run_call(ToolCall("add", {"name": "a"}), {"add": e.add}, RolloutLimits(), slots[0]) for e in ledgers))
    assert [r.content for r in run_async(go)] == ["(1,)"] * 12 and [e.lines for e in ledgers] == [["a"]] * 12


# ---- what is known of a tool


def ask(tool, running=False, **limits):
    async def go(): return await run_call(ToolCall("tool", {}), {"tool": tool}, RolloutLimits(**limits), asyncio.Semaphore(4))
    return called_from(running, lambda: run_async(go))


here = threading.local()
told = contextvars.ContextVar("told")


def of_signal(): signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM)); return "ok"
def of_thread(): return here.word
def of_context(): return told.get()
def of_chain():
    try: of_signal()
    except ValueError as e: raise RuntimeError("the clock failed") from e
    return "ok"


def of_loop():
    asyncio.get_event_loop_policy().get_event_loop()
    return "ok"


@pytest.mark.parametrize("tool", [of_signal, of_thread, of_context, of_chain, of_loop])
@pytest.mark.parametrize("running", [False, True], ids=["no loop", "running loop"])
def test_a_tool_that_python_refuses_elsewhere_is_called_where_it_belongs(tool, running):
    here.word = "ok"
    told.set("ok")
    asyncio.set_event_loop(loop := asyncio.new_event_loop())
    try: assert [ask(tool, running).content for _ in range(3)] == ["ok"] * 3
    finally: asyncio.set_event_loop(None), loop.close()


def test_what_playwright_says_elsewhere_is_known():
    "Its synchronous interface stands on greenlets, which stay on their thread."
    greenlet, said = pytest.importorskip("greenlet"), []
    begun = greenlet.greenlet(lambda: greenlet.getcurrent().parent.switch())
    begun.switch()
    def elsewhere():
        try: begun.switch()
        except greenlet.error as e: said.append(wrong_thread(e))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == [True]


def test_a_tool_is_called_elsewhere_once_and_then_known():
    threads = []
    class Bound:
        def tool(self):
            threads.append(threading.current_thread() is threading.main_thread())
            return of_signal()
    assert [ask(Bound().tool).content for _ in range(3)] == ["ok"] * 3 and threads == [False, True, True, True]


def test_a_tool_may_say_that_it_is_bound():
    class Bound:
        _thread_bound = True
        def tool(self): return threading.current_thread() is threading.main_thread()
    def function(): return threading.current_thread() is threading.main_thread()
    assert ask(function).content == "False" and ask(Bound().tool).content == "True" and ask(functools.partial(Bound().tool)).content == "True"
    function._thread_bound = True
    assert ask(function).content == "True"


def test_sqlite_that_may_be_shared_is_used_in_threads():
    class Shared:
        def __init__(self): self.db = sqlite3.connect(":memory:", check_same_thread=False)
        def tool(self): return threading.current_thread() is threading.main_thread(), self.db.execute("select 1").fetchone()
    closed = Shared()
    closed.db.close()
    assert ask(Shared().tool).content == "(False, (1,))" and "closed database" in ask(closed.tool).content


def test_an_error_that_stays_one_is_told_once_each_call():
    "Where the caller's thread does not help either, no call is made twice after the first."
    times = []
    def tool():
        times.append(1)
        raise ValueError("signal only works in main thread of the main interpreter")
    assert {ask(tool).error for _ in range(3)} == {ToolError.EXCEPTION} and len(times) == 4


def test_a_tool_on_the_callers_thread_may_run_a_loop_of_its_own():
    "As under TRL, where no loop runs in that thread."
    def tool(): return asyncio.run(asyncio.sleep(0, "ok"))
    tool._thread_bound = True
    assert ask(tool).content == ask(tool, running=True).content == "ok"


def test_other_tools_still_overlap():
    gate = threading.Barrier(4)
    def meets(): return str(gate.wait(20) >= 0)
    async def go():
        slots = asyncio.Semaphore(4)
        return await asyncio.gather(*(run_call(ToolCall("tool", {}), {"tool": meets}, RolloutLimits(), slots) for _ in range(4)))
    for running in (False, True): assert {r.content for r in called_from(running, lambda: run_async(go))} == {"True"}


def waits(begun, bound, running):
    "What an interrupted process does: it runs a tool that takes a minute."
    def tool():
        Path(begun).touch()
        time.sleep(60)
    tool._thread_bound = bound
    signal.signal(signal.SIGINT, signal.default_int_handler)   # whoever runs the tests in the background has it ignored, and children inherit that
    try: ask(tool, running)
    except KeyboardInterrupt: return 130


@pytest.mark.parametrize("running", [False, True], ids=["no loop", "running loop"])
@pytest.mark.parametrize("bound", [False, True], ids=["in a thread", "on the caller's thread"])
def test_an_interrupt_ends_tools_at_once(bound, running, tmp_path):
    process, end = forked(waits, str(tmp_path / "begun"), bound, running, said=tmp_path / "said"), time.monotonic() + 120
    while time.monotonic() < end and process.is_alive() and not (tmp_path / "begun").exists(): time.sleep(0.02)
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == 130, (tmp_path / "said").read_text()
    assert time.monotonic() - start < 30


def test_the_callers_loop_goes_on_afterwards():
    async def inside():
        task = asyncio.current_task()
        assert run_async(functools.partial(asyncio.sleep, 0, 7)) == 7
        with pytest.raises(KeyError): run_async(fails)
        assert asyncio.current_task() is task and await asyncio.sleep(0, 8) == 8
        return asyncio.get_running_loop() is asyncio.get_event_loop()
    async def fails(): raise KeyError
    assert asyncio.run(inside())


# ---- awaitables


async def slowly(text="ok"):
    await asyncio.sleep(0)
    return text


class Later:
    def __await__(self): return slowly().__await__()


class Calls:
    async def __call__(self): return await slowly()


def decorated(): return slowly()


TOOLS = {"decorated": decorated, "partial": functools.partial(slowly, "ok"), "lambda": lambda: slowly(), "callable object": Calls(), "awaitable object": Later, "twice": lambda: slowly(slowly())}


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("slots", [4, None])
def test_whatever_can_be_awaited_is_awaited(name, slots):
    async def go(): return await run_calls([ToolCall("tool", {})], {"tool": TOOLS[name]}, RolloutLimits(), slots and asyncio.Semaphore(slots))
    (result,) = asyncio.run(go())
    assert (result.content, result.error) == ("ok", None)


def test_awaitables_have_limits_and_a_loop():
    "What a plain function returns to be awaited is cut off in time, is awaited on the loop of coroutine tools, and may fail."
    async def where(): return threading.current_thread().name
    async def fails(): raise KeyError("no such ware")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="their loop", daemon=True)
    thread.start()
    call = lambda tool, loop=None, **limits: asyncio.run(run_calls([ToolCall("tool", {})], {"tool": tool}, RolloutLimits(**limits), asyncio.Semaphore(2), loop))[0]
    assert call(lambda: where(), loop).content == "their loop" and call(lambda: where()).content == threading.current_thread().name
    assert call(lambda: fails()).content == str({"error": "'no such ware'"})
    for given in (None, loop): assert call(lambda: asyncio.sleep(60), given, tool_seconds=0.05).error is ToolError.TIMEOUT
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


# ---- all of them fail


class Broken:
    def reset(self, **row): pass

    def python(self, code: str) -> str:
        """
        Fail.

        Args:
            code: Anything.
        """
        raise OSError("the disk is gone")


class Swallows(Broken):
    def python(self, code: str) -> str:
        """
        Fail, and say so as if it were an answer.

        Args:
            code: Anything.
        """
        try: return str(signal.signal(signal.SIGALRM, signal.SIG_DFL))
        except ValueError as e: return f"Error: {e}"


@pytest.mark.parametrize("environment,said", [(Broken, "failed, the first with: {'error': 'the disk is gone'}. Call the tool by hand"), (Swallows, "signal only works in main thread.*Set `_thread_bound = True`")])
def test_a_first_batch_in_which_every_call_fails_is_a_warning(environment, said, tmp_path):
    t = TIRTrainer(tiny_policy(), [answer_reward], TIRConfig(output_dir=str(tmp_path), **SMALL | dict(max_steps=2)), make_tasks("arithmetic", n=8), environment_factory=environment)
    with pytest.warns(UserWarning, match=said) as caught: t.train()
    assert sum("tool calls of the first batch failed" in str(w.message) for w in caught) == 1
    model, tok = AutoModelForCausalLM.from_pretrained(tiny_policy()).eval(), AutoTokenizer.from_pretrained(tiny_policy())
    with pytest.warns(UserWarning, match="the disk is gone" if environment is Broken else "only works in main thread.*Set `_thread_bound = True`"): evaluate(model, tok, make_tasks("arithmetic", "test", 16), environment, limits=RolloutLimits(96))


@pytest.mark.parametrize("results,said", [
    ([], None),
    (["ok", ToolError.EXCEPTION], None),
    ([ToolError.EXCEPTION], None),
    ([ToolError.UNKNOWN, ToolError.MALFORMED, ToolError.EXCEPTION], None),
    ([ToolError.EXCEPTION, ToolError.UNKNOWN, ToolError.EXCEPTION], "All 2 tool calls"),
    ([ToolError.TIMEOUT] * 3, "tool_timeout"),
])
def test_calls_that_all_fail_are_counted(results, said):
    turn = Turn([1], {}, TurnKind.TOOL_CALL, results=[ToolResult("tool", "x", r if isinstance(r, ToolError) else None) for r in results])
    found = failing_tools([Trajectory([1], [turn], StopReason.LENGTH)])
    assert said in found if said else found is None
