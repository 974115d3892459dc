"""The sandbox's wires: what comes over them may be anything. And interpreters that stay, machines elsewhere, environments on top."""
import asyncio
import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tirlab.cli import main as cli
from tirlab.sandbox import interpreters
from tirlab.sandbox import client as sandbox
from tirlab.rollout.calls import RolloutLimits, run_call
from tirlab.envs.environments import PythonEnvironment, environment_tools, isolation_of, python_environment
from tirlab.sandbox.executions import Execution, Limits, SandboxFault, Status
from tirlab.sandbox.interpreters import Interpreter
from tirlab.sandbox.remote import _post, as_script, least_loaded, ray_nodes, read_answer, read_request, remote, sandbox_server
from tirlab.sandbox.client import run_python
from tirlab.core.trajectory import ToolCall

pytestmark = pytest.mark.skipif(bool(sandbox.missing(sandbox.isolation_level())), reason=f"no sandbox: {sandbox.missing(sandbox.isolation_level())}")
TLS = httpx.create_ssl_context()   # once: it takes longer than a request
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4))


# The fork server's socket

@pytest.fixture(scope="module")
def raw_server():
    server = sandbox._start("process", "bare")
    assert ask(server, "1") == b"1\n"   # it is up, with all the files it keeps open
    yield server
    sandbox._stop(server)


def ask(server, code):
    channel = sandbox._send(server, "code", code.encode(), Limits())
    try: return bytes(sandbox._collect(channel, Limits()).out)
    finally: channel.close()


@FUZZ
@given(st.one_of(st.binary(min_size=1, max_size=5000),
                 st.from_regex(r"(code|program|stay|x)( -?[0-9]{1,25}| x){0,8}", fullmatch=True).map(str.encode)), st.integers(0, 6))
def test_any_message_to_the_server(raw_server, message, n):
    process = psutil.Process(raw_server.process.pid)
    before = process.num_fds()
    fds = [os.open("/dev/null", os.O_RDWR) for _ in range(n)]
    if n > 3 and len(message) % 2: os.close(fds[3]); fds[3] = socket.socketpair(*sandbox._SEQPACKET)[0].detach()   # a client that has gone
    socket.send_fds(raw_server.socket, [message], fds)
    for fd in fds: os.close(fd)
    assert ask(raw_server, "37 + 48") == b"85\n"
    end = time.monotonic() + 5
    while process.num_fds() > before and time.monotonic() < end: time.sleep(0.01)
    assert process.num_fds() <= before and process.memory_info().rss < 2**27


# What the child says

WORDS = [b"b", b"k", b"m", b"x 0 0 ", b"!broken", b""]

@FUZZ
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.binary(max_size=300) | st.sampled_from(WORDS)), max_size=6), st.integers(0, 3))
def test_any_report_of_the_child(messages, code):
    run = run_python(f"import os\nfor fd, m in {messages!r}: os.write(fd, m)\nos._exit({code})", Limits(seconds=10))
    assert run.status in (Status.OK, Status.ERROR, Status.MEMORY) and (run.status is Status.OK) == (code == 0)


@pytest.fixture
def session():
    with Interpreter(Limits(seconds=0.5), preload="bare") as session: yield session


@FUZZ
@example([(3, b"")], "")   # looks as if it had hung up
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.binary(min_size=1, max_size=300) | st.sampled_from(WORDS[:-1])), max_size=6),
       st.sampled_from(["", "1 / 0", "x"]))
def test_any_report_of_an_interpreter(session, messages, end):
    "It may deceive itself about its own turns; ours end in time, and nobody else notices."
    run = session.run(f"import os\nfor fd, m in {messages!r}: os.write(fd, m)\n{end}")
    assert run.status in (Status.OK, Status.ERROR, Status.MEMORY) or messages == [(3, b"")] and run.status is Status.TIMEOUT
    assert str(run_python("37 + 48")) == "85"


def test_an_interpreter_that_reports_without_end():
    code = ("import os, threading\ndef f():\n    while True: os.write(3, b'k' * 60000)\n"
            "for _ in range(8): threading.Thread(target=f, daemon=True).start()")
    with Interpreter(Limits(seconds=0.3), preload="bare") as session:
        start = time.monotonic()
        for c in (code, "1", "2", "3"): assert session.run(c).status is not Status.LOST
        assert time.monotonic() - start < 8 and psutil.Process().memory_info().rss < 2**31


# HTTP, our end and theirs

@contextlib.contextmanager
def serving(server):
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally: server.shutdown(), server.server_close()


@pytest.fixture(scope="module")
def http_server():
    server = sandbox_server(port=0)
    with serving(server): yield server


@pytest.mark.parametrize("port", [99999, 65536, -1, "8080", 1.5, True])
def test_a_port_that_is_none_is_refused_in_one_sentence(port):
    with pytest.raises(ValueError, match="is not a whole number from 1 to 65535, or 0 for a free one"): sandbox_server(port=port)


@pytest.mark.parametrize("host,port", [("127.0.0.1", None), ("no host of ours", 0)])
def test_where_nobody_can_listen_it_says_so(host, port, http_server):
    with pytest.raises(OSError, match=rf"Nobody can listen on {host}, port \d+ \(.*\); choose another port") as e: sandbox_server(host, http_server.server_port if port is None else port, token="t")
    assert "\n" not in str(e.value)


def works(server): return str(remote(f"http://127.0.0.1:{server.server_port}")("37 + 48", Limits())) == "85"


def speak(server, data):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as s, contextlib.suppress(OSError):
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := s.recv(1 << 16): answer += chunk
        return answer


@FUZZ
@given(st.binary(max_size=2000) | st.binary(max_size=200).map(lambda b: b"POST /run_code HTTP/1.1\r\n" + b) |
       st.tuples(st.binary(max_size=100), st.integers(-5, 10**12))
       .map(lambda x: b"POST /run_code HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % x[1] + x[0]))
def test_any_bytes_to_the_http_server(http_server, data):
    answer = speak(http_server, data)
    assert not answer or b"500" not in answer.split(b"\r\n")[0]


@FUZZ
@given(JSON | st.fixed_dictionaries({"code": st.just("37")}, optional={k: JSON for k in (
    "language", "run_timeout", "memory_limit_MB", "stdin", "files", "fetch_files")}))
def test_any_json_to_the_http_server(http_server, body):
    url, headers = f"http://127.0.0.1:{http_server.server_port}/run_code", {"Content-Type": "application/json"}
    response = httpx.post(url, content=json.dumps(body), headers=headers, timeout=30, verify=TLS)
    assert response.status_code in (200, 422), response.text
    assert response.status_code == 422 or response.json()["status"] in ("Success", "Failed")


def test_the_http_server_is_still_there_and_small(http_server):
    nested = b"POST /run_code HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000
    assert b" 422 " in speak(http_server, nested)
    assert works(http_server) and psutil.Process().memory_info().rss < 2**31


FIELDS = ["stdout", "stderr", "return_code", "execution_time", "status"]


@FUZZ
@given(st.binary(max_size=500) | JSON.map(lambda x: json.dumps(x).encode()) |
       st.fixed_dictionaries({"status": st.sampled_from(["Success", "Failed"]), "run_result": st.dictionaries(st.sampled_from(FIELDS), JSON)})
       .map(lambda x: json.dumps(x).encode()))
def test_any_answer_to_the_client(data):
    with contextlib.suppress(ValueError, RecursionError): assert isinstance(read_answer(json.loads(data), Limits()), Execution)


@contextlib.contextmanager
def hostile(answer):
    "A server that answers each connection with bytes, from a function of how many came before; gives its address and the count."
    listener, count = socket.create_server(("127.0.0.1", 0)), []
    def serve():
        with contextlib.suppress(OSError):
            while True:
                s = listener.accept()[0]
                count.append(1)
                with s, contextlib.suppress(OSError):
                    s.settimeout(5), s.recv(1 << 16)
                    for part in answer(len(count)): s.sendall(part)
    threading.Thread(target=serve, daemon=True).start()
    try: yield f"http://127.0.0.1:{listener.getsockname()[1]}", count
    finally: listener.close()


def ok(body, status=b"200 OK"):
    return [b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body]


GOOD = json.dumps({"status": "Success", "run_result": {"status": "Finished", "return_code": 0, "stdout": "85\n", "stderr": ""}}).encode()


@pytest.mark.parametrize("answer, tries, status", [
    (lambda n: [], 3, Status.LOST),                                                             # hangs up
    (lambda n: [b"\0" * 5000], 3, Status.LOST),
    (lambda n: [ok(GOOD)[0][:-9]], 3, Status.LOST),                                              # cut short
    (lambda n: ok(b"<html>"), 3, Status.LOST),
    (lambda n: ok(b"busy", b"503 Busy"), 3, Status.LOST),
    (lambda n: [ok(GOOD)[0].replace(b"Connection", b"Content-Encoding: gzip\r\nConnection")], 3, Status.LOST),   # which it is not
    (lambda n: ok(b"busy", b"503 Busy") if n < 3 else ok(GOOD), 3, Status.OK),                  # and recovers
    (lambda n: ok(b"no", b"401 Unauthorized"), 1, Status.LOST),                                 # not the transport's fault
    (lambda n: ok(json.dumps({"status": "SandboxError", "message": "no slots"}).encode()), 1, Status.LOST),
    (lambda n: ok(GOOD.replace(b'"return_code": 0', b'"return_code": 1')), 1, Status.ERROR),    # the code's fault is final
    (lambda n: (b"HTTP/1.1 200 OK\r\n\r\n" if i == 0 else b"x" * 10**6 for i in range(10**4)), 3, Status.LOST),   # without end
])
def test_only_faults_of_the_transport_are_tried_again(answer, tries, status):
    with hostile(answer) as (url, count): assert remote(url, tries=3, pause=0.01)("1", Limits(flood_mb=0.1)).status is status
    assert len(count) == tries


def test_a_token_is_wanted_and_checked():
    for host in ("0.0.0.0", "", "::", "10.0.0.7", "example.org", "127.0.0.1.example.org", "0", "localhost.example.org"):
        with pytest.raises(ValueError, match="set a token"): sandbox_server(host, 0)
    with serving(sandbox_server("127.0.0.1", 0, token="s3cret")) as url:
        assert str(remote(url, "s3cret")("37 + 48", Limits())) == "85"
        for token in (None, "wrong", "s3cre", "s3crets"): assert "401" in remote(url, token)("37 + 48", Limits()).error
        plain = httpx.post(url + "/run_code", content=b"{}", headers={"Authorization": "Bearer s3cret", "Content-Type": "text/plain"})
        assert plain.status_code == 415   # what a web page could send unasked


def test_an_answer_that_never_ends_does_not_hold_us_up():
    def drip(n):
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
        while True: time.sleep(0.02); yield b" "
    with hostile(drip) as (url, _), pytest.raises(httpx.ReadTimeout, match="does not end"): _post(url, {}, {}, 0.2, 10**6, 0.1)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_loopback_needs_no_token(host):
    try: server = sandbox_server(host, 0)
    except OSError as e: pytest.skip(f"no {host} here: {e}")
    server.server_close()


def test_an_address_is_a_url():
    with pytest.raises(ValueError, match="http://"): remote("10.0.0.7:8080")


def test_what_verl_sends(http_server):
    body = dict(compile_timeout=1, run_timeout=2, code="print(input())\nprint(open('d/f.txt').read())",
                stdin="37", language="python", memory_limit_MB=512,
                files={"d/f.txt": base64.b64encode(b"48").decode()}, fetch_files=[])
    answer = httpx.post(f"http://127.0.0.1:{http_server.server_port}/run_code", json=body).json()
    assert answer["status"] == "Success" and answer["run_result"]["stdout"] == "37\n48\n" and answer["run_result"]["return_code"] == 0
    for bad in ({"language": "cpp"}, {"files": {"../x": ""}}, {"files": {"/x": ""}}, {"files": {"x": "%"}}, {"stdin": 3}, {"fetch_files": ["a"]},
                {"code": None}):
        with pytest.raises(ValueError): read_request({**body, **bad})


@pytest.mark.parametrize("code", ["37 + 48", "print('a')\n1 / 0", "1 +", "x = 1", "\0", "'\ud800'", "print('é'); 'ü'",
                                  "final_answer(37)", "a = 1; a", "[\n1,\n2\n]"])
def test_remote_is_like_local(http_server, code):
    there, here = remote(f"http://127.0.0.1:{http_server.server_port}")(code, Limits()), run_python(code)
    assert (there.stdout, there.status, there.answer) == (here.stdout, here.status, here.answer)
    assert there.error.split("\n")[-1][:9] == here.error.split("\n")[-1][:9]


def test_the_script_needs_no_tirlab():
    run = subprocess.run([sys.executable, "-I", "-c", as_script("final_answer(37)\n48")], capture_output=True, text=True, check=True)
    assert run.stdout == "\\boxed{37}\n48\n"


def test_least_loaded():
    gate, seen, lock = threading.Event(), {0: 0, 1: 0}, threading.Lock()
    def machine(i):
        def run(code, limits):
            with lock: seen[i] += 1
            if i == 0: gate.wait(10)
            return Execution("", "", Status.OK, 0.0, False)
        return run
    run = least_loaded(machine(0), machine(1))
    threads = [threading.Thread(target=run, args=("", Limits())) for _ in range(2)]
    for t in threads: t.start(); time.sleep(0.05)
    for _ in range(5): run("", Limits())
    gate.set()
    for t in threads: t.join()
    assert seen == {0: 1, 1: 6}, "one is stuck, so the other gets what comes"


def test_ray(monkeypatch):
    "With a stand-in for Ray where it is not installed: an actor on each living node, and a lost actor is a fault of the sandbox's."
    calls = []
    class Actor:
        def __init__(self, cls, node): self.object, self.node = cls(), node
        @property
        def run(self): return types.SimpleNamespace(remote=lambda *a: (self, a))
    class Strategy:
        def __init__(self, node_id, soft): self.node_id = node_id
    class RayError(Exception): pass
    def get(reference, timeout):
        actor, args = reference
        calls.append(actor.node)
        if actor.node == "bad": raise RayError("actor died")
        return actor.object.run(*args)
    options = lambda cls: lambda scheduling_strategy, **_: types.SimpleNamespace(remote=lambda: Actor(cls, scheduling_strategy.node_id))
    ray = types.SimpleNamespace(nodes=lambda: [dict(NodeID=n, Alive=n != "gone") for n in ("good", "gone", "bad")], get=get,
                                remote=lambda cls: types.SimpleNamespace(options=options(cls)), exceptions=types.SimpleNamespace(RayError=RayError))
    monkeypatch.setitem(sys.modules, "ray", ray), monkeypatch.setitem(sys.modules, "ray.util", types.ModuleType("ray.util"))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", types.SimpleNamespace(NodeAffinitySchedulingStrategy=Strategy))
    run = ray_nodes()
    assert {str(run("37 + 48", Limits())) for _ in range(4)} == {"85"}
    assert set(calls) == {"good", "bad"}


def test_ray_itself():
    ray = pytest.importorskip("ray", reason="the extra tirlab[ray] is not installed")
    path = str(Path(sandbox.__file__).parents[2])
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        run = ray_nodes()
        assert str(run("37 + 48", Limits(seconds=20))) == "85" and "ZeroDivisionError" in run("1 / 0", Limits(seconds=20)).error
        actors = [p for p in psutil.process_iter(["cmdline"]) if "ray::Sandbox" in " ".join(p.info["cmdline"] or [])]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, "import time; time.sleep(20)", Limits(seconds=30))
            time.sleep(1)
            for actor in actors: actor.kill()
            assert running.result().status is Status.LOST
        assert until(lambda: str(run("37 + 48", Limits(seconds=20))) == "85"), "Ray starts the actor again"
    finally: ray.shutdown()


# Interpreters

def test_interpreters_are_counted(monkeypatch):
    monkeypatch.setattr(interpreters, "MAX_INTERPRETERS", 2)
    a, b, c = (Interpreter(preload="bare") for _ in range(3))
    a.run("x = 1"), b.run("x = 2")
    with pytest.raises(SandboxFault, match="2 interpreters are alive"): c.run("x = 3")
    a.close()
    assert str(c.run("3")) == "3" and str(b.run("x")) == "2"
    b.close(), c.close()


def test_environments_beyond_the_limit_are_dropped_and_say_why(monkeypatch):
    monkeypatch.setattr(interpreters, "MAX_INTERPRETERS", 1)
    first, second = (python_environment(stateful=True)() for _ in range(2))
    first.python("x = 37")
    with pytest.raises(SandboxFault, match="1 interpreters are alive.*let fewer rollouts run at once"): second.python("x = 48")
    first._close()
    assert second.python("48") == "48"
    second._close()


def children(): return [p for s in sandbox._servers.values() for p in psutil.Process(s.process.pid).children()]


def until(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end: time.sleep(0.02)
    return condition()


def test_forgotten_interpreters_end():
    one = Interpreter(preload="bare")
    one.run("x = 1")
    assert until(lambda: len(children()) == 1)   # once the last test's are gone
    del one
    assert until(lambda: not children())


def test_idle_interpreters_end():
    forgotten = Interpreter(preload="bare")
    forgotten.run("x = 1")
    with Interpreter(preload="bare", idle_seconds=0.05) as idle:
        idle.run("x = 37")
        assert until(lambda: len(children()) == 1)
        del forgotten   # which whoever looks for the idle has seen by now
        assert until(lambda: not children())
        assert re.match(r"\(the interpreter was idle for more than 0.05 seconds .*gone\)\n.*NameError", str(idle.run("x")), re.S)


@pytest.mark.parametrize("code, status", [
    ("while True: print('x' * 1000)", Status.FLOOD), ("while True: pass", Status.TIMEOUT), ("import os; os.abort()", Status.CRASHED),
    ("import os; os.closerange(0, 1000)", Status.ERROR), ("x = 0\nwhile True: open(str(x), 'w'); x += 1", Status.FLOOD)])
def test_an_interpreter_recovers(code, status):
    with Interpreter(Limits(seconds=0.7, flood_mb=0.1, files=20), preload="bare") as session:
        session.run("y = 1")
        assert session.run(code).status is status
        session.run("z = 5"), session.run("z")
        assert str(session.run("z")) == "5"
    assert until(lambda: not children())


def test_a_lost_interpreter_is_a_fault():
    env = python_environment(stateful=True)()
    env.reset()
    env._interpreter = Interpreter(preload="bare")
    assert env.python("x = 37") == ""
    server = sandbox._servers[sandbox.isolation_level(), "bare"].process
    server.kill(), server.wait(10)
    with pytest.raises(SandboxFault): env.python("x")
    env.reset()
    assert env.python("37 + 48") == "85"
    env._close()


# Environments

def test_a_fault_is_tried_once_more_and_then_raised():
    answers = []
    def backend(code, limits):
        answers.append(code)
        return Execution("", "SandboxError: gone", Status.LOST, 0.0, False) if len(answers) in (1, 3, 4) else run_python(code, limits)
    env = python_environment(backend=backend)()
    env.reset()
    assert env.python("37 + 48") == "85"
    with pytest.raises(SandboxFault, match="gone"): env.python("37 + 48")


@pytest.mark.parametrize("fault", [OSError("no descriptors"), RuntimeError("can't start new thread"), MemoryError(), httpx.DecodingError("?"), KeyError("run")],
                         ids=lambda e: type(e).__name__)
def test_no_fault_becomes_an_observation(fault):
    "Whatever a backend raises, and through the layer that makes observations of what tools raise."
    def backend(code, limits): raise fault
    tools = environment_tools(python_environment(backend=backend)())
    with pytest.raises(SandboxFault, match=type(fault).__name__): asyncio.run(run_call(ToolCall("python", {"code": "37 + 48"}), tools, RolloutLimits()))


def test_a_machine_without_threads_is_a_fault_too(monkeypatch):
    def none(): raise RuntimeError("can't start new thread")
    monkeypatch.setattr(interpreters, "_watch_idle", none)
    env = python_environment(stateful=True)()
    with pytest.raises(SandboxFault, match="new thread"): env.python("37 + 48")
    env._close()


def test_what_the_model_gets_wrong_is_an_observation():
    result = asyncio.run(run_call(ToolCall("python", {"code": 37}), environment_tools(PythonEnvironment()), RolloutLimits()))
    assert result.error and "code must be a string" in result.content


def test_the_isolation_of_environments_is_told(monkeypatch):
    monkeypatch.delenv("TIRLAB_ISOLATION", raising=False)
    assert isolation_of([]).startswith("locked") and isolation_of([PythonEnvironment, object]).count("locked") == 1
    assert isolation_of([python_environment(isolation="process")]).startswith("process: ")
    assert isolation_of([python_environment(backend=run_python), PythonEnvironment]).startswith("elsewhere: a backend runs the code; locked: ")


def test_settings_that_make_no_sense():
    for wrong in (dict(isolation="jail"), dict(style="loud"), dict(stateful=True, backend=run_python)):
        with pytest.raises(ValueError): python_environment(**wrong)


def test_environments_leave_it_to_the_rollout_what_the_model_reads():
    assert PythonEnvironment().python("print('a' * 5000)").strip() == "a" * 5000
    assert python_environment(style="simpletir")().python("37 + 48") == "\nCode execution result: 85\n\n"


# The command line

def test_sandbox_serve_wants_a_token_for_other_machines(capsys, monkeypatch):
    monkeypatch.delenv("TIRLAB_SANDBOX_TOKEN", raising=False)
    assert cli.main(["sandbox", "serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "set a token" in capsys.readouterr().err


def test_levels_are_never_silent(monkeypatch):
    with pytest.raises(ValueError, match="process, locked, namespaced"): run_python("1", isolation="jail")
    broken = {**sandbox.probe(), "landlock": "this kernel has none"}
    monkeypatch.setattr(sandbox, "probe", lambda: broken)
    assert sandbox.sandbox_level("locked").startswith("none: locked is not supported here (landlock: this kernel has none)")
    assert sandbox.sandbox_level("process").startswith("process:")
    monkeypatch.setattr(sandbox, "_spawn", lambda *a: subprocess.Popen(["false"]))
    with pytest.raises(sandbox.IsolationError, match='"locked".*landlock.*TIRLAB_ISOLATION'): sandbox._start("locked", "bare")
