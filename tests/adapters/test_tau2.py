"""tau2 with its real package: ground truth and spoilt calls score as its own evaluation says, users by script and behind a server."""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from unittest.mock import MagicMock

import pytest

pytestmark = pytest.mark.adapter
pytest.importorskip("tau2")

from tirlab.adapters import tau2 as adapter
from tirlab.adapters.task_set import adapter_tasks
from tirlab.adapters.tau2 import HELLO, YES, Tau2Environment, tasks, tau2_reward
from tirlab.adapters.tau2_data import TAU2_DOMAINS, new_environment, tau2_module, tau2_score, tau2_split, tau2_task
from tirlab.bench.tau2 import bench_tau2, reference_messages, replay, verdict, without_last_call
from tirlab.core.tiny import tiny_tokenizer
from tirlab.core.trajectory import StopReason, ToolError
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.endpoint import Endpoint
from tirlab.rollout.loop import open_row
from tirlab.rollout.schedule import rollouts
from tirlab.supervision.demonstrations import ScriptedEngine, is_whole

TOK = tiny_tokenizer()
TOK.model_max_length = 2**20
FEW = {"airline": 8, "retail": 10, "telecom": 16, "mock": None}


def rows_of(domain, split="base", n=None):
    found = tasks(domain, split, n)
    return found, [dict(r) for r in found.rows]


def row_of(domain, task_id): return next(r for r in rows_of(domain)[1] if r["task_id"] == task_id)


def scripted(kind, row, turns, limits=RolloutLimits(completion_tokens=2**16, observation_chars=None), schedule="turn"):
    "One rollout of a policy that says these turns, whatever comes back."
    prompt, tools, format, environment, _ = open_row(row, TOK, kind)
    done = rollouts([prompt], None, [tools], [format], limits, owners=[environment], engines={0: ScriptedEngine(lambda: (t for t in turns), format)}, schedule=schedule)[0]
    return done, environment


def call(name, /, **arguments): return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'


@pytest.fixture(scope="module")
def evaluate():
    "tau2's own `evaluate_simulation`; it imports a client of models, which is replaced and never called."
    before = sys.modules.get("litellm")
    fake = ModuleType("litellm")
    fake.__getattr__ = lambda name: MagicMock()
    for name in ("litellm", "litellm.caching", "litellm.caching.caching", "litellm.main", "litellm.utils", "litellm.types", "litellm.types.utils"):
        made = sys.modules[name] = ModuleType(name)
        made.__getattr__ = lambda attribute: MagicMock() if not attribute.startswith("__") else (_ for _ in ()).throw(AttributeError(attribute))
        made.__path__ = []
    try:
        from tau2.data_model.simulation import SimulationRun, TerminationReason
        from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
    except ImportError as e: pytest.skip(f"evaluate_simulation cannot be imported without {e.name}")
    finally:
        for name in [m for m in sys.modules if m.partition(".")[0] == "litellm"]: del sys.modules[name]
        if before: sys.modules["litellm"] = before
    def score(domain, row, messages, ended=True):
        reason = TerminationReason.USER_STOP if ended else TerminationReason.MAX_STEPS
        run = SimulationRun(id="0", task_id=row["task_id"], start_time="", end_time="", duration=0.0, termination_reason=reason, messages=messages)
        return evaluate_simulation(run, tau2_task(domain, row["task_id"]), EvaluationType.ALL, False, domain).reward
    return score


# Ground truth

@pytest.mark.parametrize("domain", TAU2_DOMAINS)
def test_ground_truth_earns_what_tau2_gives_it(domain):
    found, rows = rows_of(domain)
    done, ours = replay(found, rows, TOK)
    assert all(t.stop is StopReason.ANSWER for t in done)
    truth = [[c for c in map(json.loads, r["ground_truth"]) if "name" in c] for r in rows]
    assert [[(c.name, c.arguments) for u in t.turns for c in u.calls] for t in done] == [[(c["name"], c["arguments"]) for c in calls] for calls in truth]
    if domain == "airline":
        assert sum(map(len, truth)) == 148 and sum(is_whole(t) for t in done) == 50 and not any(r.error for t in done for r in t.results)
    doubtful = [i for i, r in enumerate(ours) if r != 1]
    some = {*doubtful, *range(len(rows))[::max(1, len(rows) // (FEW[domain] or len(rows)))]}
    assert [ours[i] for i in sorted(some)] == [verdict(domain, rows[i]) for i in sorted(some)]
    assert sum(ours) == {"airline": 50, "retail": 114, "telecom": 114, "mock": 8}[domain]


@pytest.mark.parametrize("domain", TAU2_DOMAINS)
def test_spoilt_calls_earn_what_tau2_gives_them(domain):
    found, rows = rows_of(domain)
    rows = [r for r in rows if r["ground_truth"]][::max(1, len(rows) // (FEW[domain] or 9))]
    bad = [without_last_call(r) for r in rows] + [r | {"answer": "Done."} for r in rows[:4]]
    ours, theirs = replay(found, bad, TOK)[1], [verdict(domain, r) for r in bad]
    assert ours == theirs and sum(theirs) < len(bad)


@pytest.mark.parametrize("domain", TAU2_DOMAINS)
def test_parts_are_put_together_as_evaluate_simulation_does(domain, evaluate):
    rows = rows_of(domain)[1]
    rows = rows[::max(1, len(rows) // 5)]
    for row in rows + [without_last_call(r) for r in rows if r["ground_truth"]]:
        messages = reference_messages(domain, row)
        assert tau2_score(domain, tau2_task(domain, row["task_id"]), messages) == evaluate(domain, row, messages) and evaluate(domain, row, messages, False) == 0


@pytest.mark.parametrize("call_format", ["json", "list"])
def test_other_call_formats(call_format):
    found, rows = rows_of("airline", n=6)
    assert replay(found, rows, TOK, call_format)[1] == [1.0] * 6


def test_the_bench_has_its_keys():
    figures = bench_tau2(2)
    assert {"tasks", "ground_truth_pass", "reference_pass", "seconds"} <= set(figures)
    assert figures["tasks"] == figures["ground_truth_pass"] == figures["reference_pass"] == figures["agree"] == 2 and figures["spoilt_agree"] == figures["spoilt"]


# Databases

def test_rollouts_share_no_state():
    for domain in TAU2_DOMAINS:
        one, two = new_environment(domain), new_environment(domain)
        assert one.get_db_hash() == two.get_db_hash() and one.get_user_db_hash() == two.get_user_db_hash()
    found, rows = rows_of("airline")
    changing = [r for r in rows if any(w in line for line in r["ground_truth"] for w in ("cancel", "update", "book"))][:6]
    assert replay(found, changing * 3, TOK)[1] == [1.0] * 18
    first = adapter.first_environment("airline")
    assert first.get_db_hash() == tau2_module("domains.airline.environment").get_environment().get_db_hash()   # what they share is as it was


def test_a_power_is_not_computed():
    t, _ = scripted(Tau2Environment, row_of("retail", "0"), [call("calculate", expression="9**9**9"), call("calculate", expression="2 * 3"), "Done."])
    assert [r.error for r in t.results] == [ToolError.EXCEPTION, None] and "powers" in t.results[0].content and "6" in t.results[1].content


def test_odd_calls_are_errors_that_the_model_reads():
    odd = [call("get_user_details"), call("get_user_details", user_id=3), call("get_user_details", tool_name="x", requestor="user"), call("nothing"), call("book_reservation", flights="x"),
           call("get_user_details", user_id=None, name="x", who="y")]
    t, environment = scripted(Tau2Environment, row_of("airline", "0"), [*odd, "Done."])
    assert t.stop is StopReason.ANSWER and all(r.error for r in t.results) and len(t.results) == len(odd)
    assert tau2_reward([t.messages], [environment]) == [1.0]   # task 0 wants nothing to be changed


# Users

def test_the_scripted_user_follows_its_rules():
    row = row_of("airline", "3")
    assert "JMO1MG" in row["prompt"][-1]["content"] and row["prompt"][0]["role"] == "system"
    t, environment = scripted(Tau2Environment, row, ["May I?", call("get_reservation_details", reservation_id="JMO1MG"), "You may take 4 suitcases. Is that fine?", "Good bye."])
    assert [u.reply for u in t.turns] == [YES, None, YES, None] and t.stop is StopReason.ANSWER and tau2_reward([t.messages], [environment]) == [1.0]
    t, environment = scripted(Tau2Environment, row, ["Well?"] * 20)
    assert sum(u.reply is not None for u in t.turns) == 8 and environment._ended


def test_a_conversation_that_is_cut_off_earns_nothing():
    row = row_of("airline", "0")
    t, environment = scripted(Tau2Environment, row, ["May I? " * 400], RolloutLimits(completion_tokens=40))
    assert t.stop is StopReason.LENGTH and tau2_reward([t.messages], [environment]) == [0.0]


def test_what_is_told_beside_a_call_counts_as_in_tau2():
    row = row_of("airline", "3")
    for text, reward in (("You may take 4 suitcases.", 1.0), ("You may take some.", 0.0)):
        t, environment = scripted(Tau2Environment, row, [text + call("get_reservation_details", reservation_id="JMO1MG"), "Good bye."])
        assert len(t.results) == 1 and tau2_reward([t.messages], [environment]) == [reward]


def test_the_users_own_tools_are_not_the_agents():
    row = rows_of("telecom", n=1)[1][0]
    t, environment = scripted(Tau2Environment, row, [call("toggle_airplane_mode"), "Run toggle_airplane_mode(), please.", "Run it, toggle_airplane_mode!"])
    assert t.results[0].error is ToolError.UNKNOWN and t.turns[1].reply.startswith("toggle_airplane_mode(): ") and environment._ended


@contextmanager
def server(say, seen):
    "A chat completion server on this machine that stops by itself."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            said = say(seen[-1])
            data = b"no" if isinstance(said, int) else json.dumps({"choices": [{"message": said, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}).encode()
            self.send_response(said if isinstance(said, int) else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        def log_message(self, *args): pass
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{http.server_port}/v1"
    finally: http.shutdown(); http.server_close()


def test_a_model_as_user():
    def say(body):
        heard = body["messages"][-1]["content"]
        return {"content": "###STOP###" if "4" in heard else "How many suitcases?"}
    seen = []
    with server(say, seen) as url:
        found = tasks("airline", "base", user=url, user_model="stub")
        row = next(dict(r) for r in found.rows if r["task_id"] == "3")
        assert row["prompt"][-1]["content"] == HELLO
        t, environment = scripted(found.environment, row, ["How can I help?", call("get_reservation_details", reservation_id="JMO1MG"), "You may take 4."])
    assert [u.reply for u in t.turns] == ["How many suitcases?", None, None] and found.rewards[0]([t.messages], [environment]) == [1.0]
    assert "JMO1MG" in seen[0]["messages"][0]["content"] and seen[0]["model"] == "stub" and seen[0]["temperature"] == 0 and "tools" not in seen[0]
    assert [m["role"] for m in seen[1]["messages"]] == ["system", "assistant", "user", "assistant", "user"]   # roles are swapped


def test_a_model_as_user_has_the_users_tools():
    def say(body):
        if sum(m["role"] == "user" for m in body["messages"]) > 1: return {"content": "###STOP###"}
        if body["messages"][-1]["role"] == "tool": return {"content": f"It says {body['messages'][-1]['content'][:20]}"}
        return {"content": None, "tool_calls": [{"id": "a", "type": "function", "function": {"name": "toggle_airplane_mode", "arguments": "{}"}}]}
    seen = []
    with server(say, seen) as url:
        found = tasks("telecom", "base", 1, user=Endpoint(url, "stub"))
        t, environment = scripted(found.environment, dict(found.rows[0]), ["Toggle airplane mode.", "Good bye."])
    assert t.turns[0].reply.startswith("It says Airplane Mode") and "toggle_airplane_mode" in json.dumps(seen[0]["tools"])
    assert [m.requestor for m in environment._messages if m.role == "tool"][:1] == ["user"]


@pytest.mark.parametrize("how", ["down", "error", "silent", "endless"])
def test_a_user_that_cannot_be_reached_drops_the_rollout(how):
    seen, again = [], {"content": None, "tool_calls": [{"id": "a", "type": "function", "function": {"name": "nothing", "arguments": "{}"}}]}
    says = {"error": 500, "silent": {"content": 3}, "endless": again, "down": 500}[how]
    with server(lambda body: says, seen) as url: kept = url
    row = rows_of("airline", n=1)[1][0]
    def run(url):
        found = tasks("airline", "base", 1, user=Endpoint(url, "stub", retries=0, timeout=5))
        return scripted(found.environment, row, ["How can I help?", "Good bye."])[0]
    if how == "down": t = run(kept)
    else:
        with server(lambda body: says, seen) as url: t = run(url)
    assert t.stop is StopReason.FAILED and t.error.startswith("The user did not answer") and "\n" not in t.error


def test_other_rollouts_go_on_while_a_user_thinks():
    free, waiting = threading.Event(), []
    def say(body):
        waiting.append(1)
        if len(waiting) == 4: free.set()
        assert free.wait(20)
        return {"content": "###STOP###"}
    with server(say, []) as url:
        found = tasks("airline", "base", 4, user=Endpoint(url, "stub", retries=0, timeout=30))
        opened = [open_row(dict(r), TOK, found.environment) for r in found.rows]
        engines = {i: ScriptedEngine(lambda: (t for t in ["Hi."]), o[2]) for i, o in enumerate(opened)}
        done = rollouts([o[0] for o in opened], None, [o[1] for o in opened], [o[2] for o in opened], RolloutLimits(400), owners=[o[3] for o in opened], engines=engines, schedule="eager")
    assert len(waiting) == 4 and all(t.stop is StopReason.ANSWER for t in done)


# Bad input

@pytest.mark.parametrize("name, options, says", [
    ("tau2/airlines", {}, "nearest is airline"), ("tau2/airline", {"split": "dev"}, "train"), ("tau2/airline", {"users": "x"}, "takes no option users"),
    ("tau2/airline", {"user": "http://localhost:1/v1"}, "user_model"), ("tau2/", {}, "no domain")])
def test_bad_input(name, options, says):
    with pytest.raises(ValueError, match=says) as e: adapter_tasks(name, **options)
    assert "\n" not in str(e.value)


def test_a_task_that_needs_a_judge_is_left_out(monkeypatch):
    task = tau2_task("mock", "create_task_1")
    kinds = tau2_module("data_model.tasks")
    judged = task.model_copy(deep=True)
    judged.evaluation_criteria.reward_basis = [kinds.RewardType.NL_ASSERTION]
    for module in (adapter, sys.modules["tirlab.adapters.tau2_data"]):
        monkeypatch.setattr(module, "tau2_task", lambda domain, i: judged if i == "create_task_1" else tau2_task(domain, i))
    with pytest.warns(UserWarning, match="create_task_1 .* judge"): rows = tasks("mock").rows
    assert len(rows) == 8 and "create_task_1" not in rows["task_id"]
    with pytest.raises(ValueError, match="judge model"): tau2_score("mock", judged, [])


def test_an_unknown_task():
    with pytest.raises(ValueError, match="no task 'x'"): Tau2Environment().reset("airline", "x")
    assert tau2_split("telecom", "small") and len(tau2_split("mock", None)) == 9
