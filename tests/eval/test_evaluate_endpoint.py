"""Endpoints: a local server stands in for a model; its rollouts, its record, and what happens when it is slow, wrong or gone."""
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from datasets import Dataset

from tirlab.cli import main as cli
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.endpoint import Endpoint, EndpointFormat, read_message, wire_messages
from tirlab.rollout.engines import EngineError, Sampling
from tirlab.envs.environments import BookingEnvironment
from tirlab.eval.estimates import read_items
from tirlab.eval.runs import Sampler, evaluate_run
from tirlab.eval.evaluate import evaluate
from tirlab.plots.token_html import token_html
from tirlab.rollout.loop import rollout, run_async
from tirlab.envs.tasks import ENVIRONMENTS, make_tasks
from tirlab.traces.run import open_run
from tirlab.core.trajectory import StopReason, TurnKind

TASKS = make_tasks("arithmetic", "test", 6)
TRUTH = {row["prompt"][0]["content"]: row for row in TASKS}


def call(code, id="c0"): return {"id": id, "type": "function", "function": {"name": "python", "arguments": json.dumps({"code": code})}}


def solve(body):
    "What a model that always solves the task says next, with calls as messages."
    asked = next(m["content"] for m in body["messages"] if m["role"] == "user")
    row, done = TRUTH[asked], [m for m in body["messages"] if m["role"] == "tool"]
    calls = [json.loads(c)["arguments"]["code"] for c in row["ground_truth"]]
    if len(done) == len(calls): return {"content": done[-1]["content"].strip()}
    return {"content": None, "tool_calls": [call(calls[len(done)], f"c{len(done)}")]}


@contextmanager
def server(say=solve, usage=True, seen=None):
    "A chat completion server on this machine; `say` may return a message, a whole answer, a status or bytes, and may take its time."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None: seen.append(body)
            said, status = say(body), 200
            if isinstance(said, int): status, data = said, b"no"
            elif isinstance(said, bytes): data = said
            else: data = json.dumps(said if "choices" in said else {"choices": [{"message": said, "finish_reason": "stop"}]} | ({"usage": {"completion_tokens": 11}} if usage else {})).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError: pass   # whoever asked has gone
        def log_message(self, *args): pass
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try: yield f"http://127.0.0.1:{http.server_port}/v1"
    finally: http.shutdown(); http.server_close()


def endpoint(url, **more): return Endpoint(url, "stub", **{"retries": 0, "timeout": 5, "concurrency": 4} | more)
def sampler(url, limits=RolloutLimits(512), **more): return Sampler(endpoint(url, **more), environment_factory=ENVIRONMENTS, limits=limits)


def test_the_command_scores_an_endpoint_and_records_only_what_it_knows(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setenv("SOME_KEY", "secret")
    with server(seen=seen) as url:
        assert cli.main(["eval", f"endpoint={url}", "model=stub", "tasks=arithmetic", "n=6", "k=2", "key_env=SOME_KEY", f"out={tmp_path}/run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["complete"] and result["cells"]["chat"]["estimates"]["avg@2"]["mean"] == 1 and result["cells"]["chat"]["estimates"]["pass@2"]["mean"] == 1
    assert {"model", "messages", "tools", "temperature", "max_tokens", "seed"} <= set(seen[0]) and seen[0]["tools"][0]["function"]["name"] == "python"
    run = open_run(tmp_path / "run")
    index, row = run.index(), run.trajectory("chat-00000-000")
    assert run.meta()["tokens"].startswith("not known") and index.tokens.isna().all() and index.prompt_tokens.isna().all() and set(index.split) == {"eval"}
    assert (index.model_tokens == 11 * index.turns).all()   # what the server said
    assert set(row.ids) == {-1} and np.isnan(row.sampling_logprob).all() and np.isnan(row.logprob).all() and not len(row.prompt_ids)
    assert TASKS[0]["prompt"][0]["content"] in "".join(row.prompt_text) and TASKS[0]["answer"] in "".join(row.text) and list(row.mask[:2]) == [1, 0] and token_html(row)
    assert not any(b"secret" in p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())


def test_a_server_that_does_not_count_is_not_counted_for(tmp_path):
    with server(usage=False) as url: result = evaluate_run(tmp_path, {"chat": (TASKS, "chat")}, sampler(url), schedule="eager")
    assert result["cells"]["chat"]["tokens"] is None and open_run(tmp_path).index().model_tokens.isna().all() and result["complete"]


def test_calls_as_text_reach_the_same_items(tmp_path):
    def say(body):
        told = [m["content"] for m in body["messages"][2:] if m["role"] == "user"]
        row = TRUTH[body["messages"][1]["content"]]
        calls = [json.loads(c)["arguments"]["code"] for c in row["ground_truth"]]
        if len(told) == len(calls): return {"content": row["answer"]}
        return {"content": f"[python(code={calls[len(told)]!r})]"}
    seen = []
    with server(say, seen=seen) as url: result = evaluate_run(tmp_path, {"list": (TASKS, "list")}, sampler(url), schedule="eager")
    assert result["cells"]["list"]["estimates"]["avg@1"]["mean"] == 1 and "tools" not in seen[0] and "[name(argument=value)]" in seen[0]["messages"][0]["content"]


def test_timeouts_leave_partial_results_marked_and_the_same_call_goes_on(tmp_path, capsys):
    slow, mended = TASKS[2]["prompt"][0]["content"], threading.Event()
    def say(body):
        if body["messages"][0]["content"] == slow: mended.wait(60)
        return solve(body)
    with server(say) as url:
        words = ["eval", f"endpoint={url}", "model=stub", "tasks=arithmetic", "n=6", "timeout=4", "retries=0", f"out={tmp_path}/run"]
        assert cli.main(words) == 1
        shown = capsys.readouterr()
        assert "Not complete: 1 tries failed" in shown.out and "timed out" in shown.out
        run = open_run(tmp_path / "run")
        assert run.status() == "interrupted" and "timed out" in run.meta()["error"] and (run.index().reward == 1).sum() == 5
        assert run.index().query("stop == 'failed'").dropped.str.contains("timed out").all()
        mended.set()
        assert cli.main(words) == 0
    index = open_run(tmp_path / "run").index()
    assert len(index) == 6 and (index.reward == 1).all() and open_run(tmp_path / "run").status() == "finished"


def test_a_server_that_is_gone_is_given_up(tmp_path):
    with server() as url: pass
    tasks, one = make_tasks("arithmetic", "test", 40), sampler(url, patience=5, concurrency=2)
    result = evaluate_run(tmp_path, {"chat": (tasks, None)}, one, batch_size=2, schedule="eager")
    assert not result["complete"] and result["failed"] + result["missing"] == 40 and result["missing"] >= 30 and "tries were not made" in result["problem"]
    with server(lambda body: {"content": "7"}) as other:
        one.engine.base_url = other
        assert evaluate_run(tmp_path, {"chat": (tasks, None)}, one, batch_size=2, schedule="eager")["complete"]


@pytest.mark.parametrize("say,said", [
    (lambda body: 500, "HTTP 500"), (lambda body: 401, "HTTP 401"), (lambda body: b"<html>", "not in JSON"), (lambda body: {"choices": []}, "no chat completion"),
    (lambda body: {"choices": [{"message": None}]}, "no message"), (lambda body: {"choices": [{"message": {"content": 3}}]}, "no message"),
])
def test_nonsense_is_a_failed_try_with_a_reason(say, said, tmp_path):
    with server(say) as url: result = evaluate_run(tmp_path, {"chat": (TASKS.select([0]), None)}, sampler(url), schedule="eager")
    assert result["failed"] == 1 and said in result["problem"] and read_items(tmp_path)["chat", 0]["rewards"] == [None]


def one(url, limits=RolloutLimits(512), sampling=Sampling(2**31), first_call_only=False, name=None, **more):
    line, environment = endpoint(url, **more).rollout_engine(limits.completion_tokens), ENVIRONMENTS["arithmetic"]()
    format = EndpointFormat(line, [environment.python], name, first_call_only)
    return run_async(lambda: rollout(format.prompt([{"role": "user", "content": "6*7?"}]), line, environment, format, limits, sampling=sampling))


def test_limits_hold_as_for_tokens():
    forever = {"content": None, "tool_calls": [call("1")]}
    with server(lambda body: forever) as url:
        assert one(url, RolloutLimits(512, tool_rounds=2)).stop is StopReason.MAX_TURNS
        budget = one(url, RolloutLimits(40))   # 11 tokens a turn
        assert budget.stop is StopReason.LENGTH and len(budget.turns) == 4
    with server(lambda body: {"choices": [{"message": {"content": "cut"}, "finish_reason": "length"}]}) as url: assert one(url).stop is StopReason.LENGTH
    def refuse(body): return {"content": None, "tool_calls": [call("1")]} if len(body["messages"]) < 3 else 400
    with server(refuse) as url: assert one(url).stop is StopReason.FAILED


def test_a_full_context_ends_a_rollout_and_is_no_failure(monkeypatch):
    from tirlab.rollout import endpoint as room
    def answer(url, body, *rest):
        if len(body["messages"]) > 2: raise RuntimeError("HTTP 400: This model's maximum context length is 9 tokens")
        return json.dumps({"choices": [{"message": {"content": None, "tool_calls": [call("1")]}}]}).encode()
    monkeypatch.setattr(room, "post_with_retries", answer)
    done = one("http://127.0.0.1:9/v1")
    assert done.stop is StopReason.LENGTH and len(done.turns) == 1


def test_a_broken_call_is_told_and_mended():
    def say(body):
        last = body["messages"][-1]
        if last["content"] == "6*7?": return {"content": None, "tool_calls": [call("") | {"function": {"name": "python", "arguments": '{"code": "6*'}}]}
        return {"content": "sorry" if "malformed" in last["content"] else last["content"]}
    seen = []
    with server(say, seen=seen) as url: done = one(url)
    assert done.turns[0].kind is TurnKind.TEXT_POLLUTION and done.messages[-1]["content"] == "sorry" and done.stop is StopReason.ANSWER
    assert [m["role"] for m in seen[-1]["messages"]] == ["user", "assistant", "user"]   # an answer to no call


def test_only_the_first_call_counts_where_that_is_asked():
    said = {"content": "Two.", "tool_calls": [call("1", "a"), call("2", "b")]}
    seen = []
    with server(lambda body, said=said: said if len(body["messages"]) == 1 else {"content": "done"}, seen=seen) as url: done = one(url, first_call_only=True)
    assert len(done.calls) == 1 and [c["id"] for c in seen[-1]["messages"][1]["tool_calls"]] == ["a"]
    text = "```python\n1\n```\nand\n```python\n2\n```"
    with server(lambda body: {"content": text} if len(body["messages"]) == 2 else {"content": "done"}, seen=seen) as url: done = one(url, first_call_only=True, name="fenced")
    assert len(done.calls) == 1 and seen[-1]["messages"][2]["content"] == "```python\n1\n```"


def test_a_call_that_was_cut_is_not_run():
    whole, begun, half = call("1", "a"), call("1", "b") | {"function": {"name": "python", "arguments": ""}}, call("1", "c") | {"function": {"name": "python", "arguments": '{"code": "1'}}
    for calls, run in (([begun], 0), ([half], 0), ([whole, begun], 1)):
        said = {"choices": [{"message": {"content": None, "tool_calls": calls}, "finish_reason": "length"}]}
        with server(lambda body, said=said: said if len(body["messages"]) == 1 else {"content": "done"}) as url: assert len(one(url).calls) == run, calls


def test_messages_on_the_wire():
    calls = [call("1", "a"), {"id": "b", "type": "function", "function": {"name": "book", "arguments": '{"day": 3}'}}]
    message = read_message({"content": "<think>why</think>Now.", "tool_calls": calls})
    assert message["content"] == "Now." and "why" in message["reasoning"] and message["tool_calls"][1]["function"]["arguments"] == {"day": 3}
    out = wire_messages([message, {"role": "tool", "name": "book", "content": "x"}, {"role": "tool", "name": "python", "content": "y"}, {"role": "tool", "name": "python", "content": "z"}])
    assert [m.get("tool_call_id") for m in out] == [None, "b", "a", None] and out[3]["role"] == "user" and set(out[0]) == {"role", "content", "tool_calls"}
    assert [json.loads(c["function"]["arguments"]) for c in out[0]["tool_calls"]] == [{"code": "1"}, {"day": 3}]


class Talks(BookingEnvironment):
    "Somebody who asks twice, and has a new tool the second time."
    asked = 0
    def _reply(self, text):
        self.asked += 1
        return ("And now?", [cancel]) if self.asked == 1 else None


def cancel(day: int) -> str:
    """
    Cancel a day.

    Args:
        day: Number of the day.
    """
    return f"day {day} is free"


def test_a_user_who_goes_on_and_brings_a_tool():
    seen = []
    with server(lambda body: {"content": f"{len(body['messages'])}"}, seen=seen) as url:
        line, environment = endpoint(url).rollout_engine(), Talks()
        format = EndpointFormat(line, [environment.book])
        done = run_async(lambda: rollout(format.prompt([{"role": "user", "content": "Hello"}]), line, environment, format))
    assert [m["content"] for m in done.messages] == ["1", "And now?", "3"]
    assert [[t["function"]["name"] for t in body["tools"]] for body in seen] == [["book"], ["book", "cancel"]]


def test_the_schedule_that_an_endpoint_needs_is_chosen_and_another_is_refused(tmp_path):
    with server() as url:
        found = evaluate(None, None, TASKS, ENVIRONMENTS, engine=endpoint(url), k=2)
        assert found.rewards == [1.0] * 12 and found.estimates()["pass@2"].mean == 1
        assert evaluate_run(tmp_path / "a", {"chat": (TASKS, "chat")}, sampler(url))["cells"]["chat"]["estimates"]["avg@1"]["mean"] == 1
        for ask in (lambda: evaluate(None, None, TASKS, ENVIRONMENTS, engine=endpoint(url), schedule="turn"), lambda: evaluate_run(tmp_path / "b", {"chat": (TASKS, None)}, sampler(url), schedule="turn")):
            with pytest.raises(ValueError, match="schedule='turn' does not fit Endpoint, which needs schedule='eager'; leave schedule out"): ask()
    assert not (tmp_path / "b").exists()


def test_an_environment_without_tools_talks_to_an_endpoint_and_gives_its_reward(tmp_path):
    class Game:
        def reset(self, secret, **row): self.secret, self.said = secret, []; return "Guess."
        def _reply(self, text):
            self.said.append(text)
            return None if text == self.secret else ("Wrong.", [])
        def get_reward(self): return 1.0 / len(self.said)
    rows, seen = Dataset.from_list([{"secret": "7"}]), []
    def reads(prompts, log_metric, **kwargs): seen.extend(prompts); log_metric("seen", 1); return [0.0] * len(prompts)
    with server(lambda body: {"content": "7" if len(body["messages"]) > 1 else "3"}) as url:
        found = evaluate(None, None, rows, Game, reads, engine=endpoint(url))
        result = evaluate_run(tmp_path, {"chat": (rows, None)}, Sampler(endpoint(url), environment_factory=Game), reads)
    assert found.rewards == [0.5] and found.by_function == {"reads": [0.0], "Game": [0.5]} and seen == [[{"role": "user", "content": "Guess."}]] * 2
    assert result["cells"]["chat"]["metrics"] == {"seen": 1.0} and open_run(tmp_path).index().reward.iloc[0] == 0.5


def test_variables_of_the_servers_template_are_sent(tmp_path):
    seen = []
    with server(seen=seen) as url:
        assert cli.main(["eval", f"endpoint={url}", "model=stub", "tasks=arithmetic", "n=1", "chat_template_kwargs={enable_thinking: false}", f"out={tmp_path}/run"]) == 0
    assert seen[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_settings_and_keys_are_checked(monkeypatch):
    for bad in (dict(base_url="localhost"), dict(base_url="http://me:secret@host/v1"), dict(timeout=0), dict(concurrency=0)):
        with pytest.raises(ValueError): Endpoint(**dict(base_url="http://127.0.0.1:9/v1", model="m") | bad)
    monkeypatch.setenv("BAD_KEY", "a\nb")
    with pytest.raises(EngineError, match="BAD_KEY") as e: run_async(lambda: Endpoint("http://127.0.0.1:9/v1", "m", "BAD_KEY").rollout_engine().generate([], Sampling()))
    assert "a\nb" not in str(e.value)
