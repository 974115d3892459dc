"""The sandbox where it meets threads, forks and sudden death. What single pieces of code get to see is in nbs/10_sandbox/05_client.ipynb."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tirlab.sandbox import client as sandbox
from tirlab.sandbox.interpreters import Interpreter
from tirlab.sandbox.client import Limits, Status, run_python

DAEMON = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)\ntime.sleep(0.1)\n"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


BARE = sandbox.isolation_level(), "bare"


@pytest.fixture(autouse=True)
def level_is_there(request):
    if missing := sandbox.missing(sandbox.isolation_level()): pytest.skip(f"this machine has no {sandbox.isolation_level()} sandbox: {missing}")


def server() -> psutil.Process:
    assert str(run_python("37 + 48")) == "85"
    return psutil.Process(sandbox._servers[BARE].process.pid)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(0.02)
    return condition()


def descriptors(process):
    "Open descriptors once it is quiet: the server closes an execution's socket just after its last word."
    counts = [process.num_fds(), -1]
    while counts[-1] != counts[-2]: time.sleep(0.1); counts.append(process.num_fds())
    return counts[-1]


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def python(script, program=sys.executable, **kwargs):
    return subprocess.run([program, "-c", script], capture_output=True, text=True, timeout=60, **kwargs)


def test_many_threads_each_get_their_own_answer():
    codes = [f"import time; time.sleep({i % 5} / 100); print({i}); {i} ** 2" for i in range(200)]
    with ThreadPoolExecutor(40) as pool: results = list(pool.map(run_python, codes))
    assert [str(r) for r in results] == [f"{i}\n{i ** 2}" for i in range(200)]


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=[]), max_size=40))
def test_any_text_is_an_execution(code):
    execution = run_python(code, Limits(seconds=5))
    str(execution).encode()
    assert execution.status in (Status.OK, Status.ERROR)


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory_mb": -1}, {"output_chars": float("nan")}, {"seconds": float("inf")}])
def test_limits_must_make_sense(limits):
    with pytest.raises(ValueError, match=f"{next(iter(limits))}.*positive"): Limits(**limits)


def test_time_and_processor_limits():
    start = time.monotonic()
    ignoring = "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(100)"
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(run_python, "while True: pass", Limits(seconds=25, cpu_seconds=1))
        assert run_python("while True: pass", Limits(seconds=0.3)).status is Status.TIMEOUT
        assert run_python(ignoring, Limits(seconds=0.3)).status is Status.TIMEOUT
        assert busy.result().status is Status.TIMEOUT and "processor" in busy.result().error
    assert time.monotonic() - start < 25


@pytest.mark.parametrize("code", [
    "import os; os.write(3, b'x 0 0 '); os.write(3, b'!no locks'); os.write(1, b'lie')",
    "import os, time; os.write(3, b'k'); time.sleep(100)",
    "import os\nwhile True: os.write(3, b'f' * 5000)",
    "import os; os.write(3, b'e' + b'\\xff' * 5000); os._exit(1)",
    "import os; os.write(3, b''); os.write(3, b'')",
    "import os; os.closerange(0, 1000); 1 / 0",
    "import os, time; os.closerange(0, 1000); time.sleep(100)",
    "import os, socket; socket.socket(fileno=3).shutdown(2); import time; time.sleep(100)",
    "import sys; sys.stdout = sys.stderr = None; print('x')",
    "import os; os._exit(1)",
])
def test_lies_about_itself_stay_with_the_liar(code):
    assert run_python(code, Limits(seconds=0.25)).status is not Status.LOST
    assert str(run_python("37 + 48")) == "85"
    assert wait_until(lambda: not server().children())


def test_child_holds_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("TIRLAB_SECRET", "1")
    read, write = os.pipe()
    os.set_inheritable(read, True), os.set_inheritable(write, True)
    sandbox._stop(server() and sandbox._servers[BARE])
    code = ("import os\ndef is_open(n):\n    try: return os.fstat(n) is not None\n    except OSError: return False\n"
            "sum(map(is_open, range(1024))), 'TIRLAB_SECRET' in os.environ")
    assert str(run_python(code)) == "(4, False)"
    os.close(read), os.close(write)


def test_leaves_no_process_file_or_descriptor(tmp_path):
    zygote = server()
    with contextlib.ExitStack() as stack:   # the server keeps as many scratch folders as were ever in use at once
        for _ in range(8): stack.enter_context(Interpreter(preload="bare")).run("1")
    before = descriptors(zygote), descriptors(psutil.Process())
    deep = "import os\nfor _ in range(1500): os.mkdir('d' * 100); os.chdir('d' * 100)"
    locked = f"import os; os.makedirs('a/b'); open('a/b/c', 'w'); os.symlink({str(tmp_path)!r}, 'a/link'); os.chmod('a/b', 0); os.chmod('a', 0)"
    thread = "import threading, time; threading.Thread(target=time.sleep, args=(100,)).start()"
    codes = [DAEMON, deep, locked, thread, "while True: pass", "print('x' * 10**7)", "1 / 0", "open('file', 'w').write('text')"] * 2
    tmp_path.chmod(0o755)
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda code: run_python(code, Limits(seconds=0.4)), codes))
    assert wait_until(lambda: not zygote.children(recursive=True))
    assert server() == zygote
    assert descriptors(zygote) <= before[0] and descriptors(psutil.Process()) == before[1]   # a folder with much in it is not used again
    assert not list(Path(sandbox._servers[BARE].folder).glob("*/*"))
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_full_folder_holds_nobody_up():
    server()
    code = "import os, time\nt = time.time()\nfor i in range(300): os.mkdir(str(i)); open(f'{i}/x', 'w').close()\ntime.time() - t"
    run = run_python(code, Limits(seconds=20))
    assert run.seconds - float(str(run)) < 0.6, "not the seconds that clearing away takes"
    assert wait_until(lambda: not list(Path(sandbox._servers[BARE].folder).glob("*/*")))


def test_killed_server_is_replaced():
    first = server()
    first.kill()
    assert server() != first


def test_killed_server_takes_its_children_along_and_says_so():
    first, folder = server(), Path(sandbox._servers[BARE].folder)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(run_python, "import os, time; os.mkdir('begun'); time.sleep(20)", Limits(seconds=30)) for _ in range(4)]
        assert wait_until(lambda: len(list(folder.glob("*/begun"))) == 4)   # what has not begun is sent again, and is no loss
        children = first.children()
        first.kill()
        assert {r.result().status for r in running} == {Status.LOST}
    assert wait_until(lambda: all(gone(c.pid) for c in children))
    assert server() != first and not folder.exists()


def test_stalled_server_is_replaced(monkeypatch):
    first = server()
    monkeypatch.setattr(sandbox, "_PATIENCE", 1), monkeypatch.setattr(sandbox, "_GRACE", 0.1)
    first.suspend()
    assert server() != first and gone(first.pid)


def test_stalled_server_loses_what_had_begun_and_does_not_repeat_it(monkeypatch, tmp_path):
    run_python("1", isolation="process")
    first = psutil.Process(sandbox._servers["process", "bare"].process.pid)
    monkeypatch.setattr(sandbox, "_PATIENCE", 1), monkeypatch.setattr(sandbox, "_GRACE", 0.1)
    code = f"import time; open('{tmp_path}/begun', 'a').write('x'); time.sleep(20)"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_python, code, Limits(seconds=0.2), "process")
        assert wait_until((tmp_path / "begun").exists)
        first.suspend()
        assert running.result().status is Status.LOST
    assert str(run_python("37 + 48", isolation="process")) == "85" and gone(first.pid)
    assert (tmp_path / "begun").read_text() == "x"


def test_a_slow_server_makes_no_timeout_of_what_ended_in_time():
    zygote = server()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_python, "import os, time; os.mkdir('begun'); time.sleep(0.1); print(37)", Limits(seconds=0.5))
        assert wait_until(lambda: list(Path(sandbox._servers[BARE].folder).glob("*/begun")))
        zygote.suspend()
        time.sleep(0.7)
        zygote.resume()
        assert (running.result().status, running.result().stdout) == (Status.OK, "37\n")


def test_interrupt_ends_the_execution():
    zygote = server()
    def interrupt(*_): raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt): run_python("import time; time.sleep(20)", Limits(seconds=30))
    signal.signal(signal.SIGALRM, before)
    assert wait_until(lambda: not zygote.children())


PARENT = f"""
import os, threading, time
from tirlab.sandbox import client as sandbox
from tirlab.sandbox.client import Limits, run_python
run_python("1", isolation="process")
threading.Thread(target=run_python, args=({DAEMON!r} + "time.sleep(1000)", Limits(seconds=1000), "process"), daemon=True).start()
server, = sandbox._servers.values()
print(server.process.pid, server.folder, flush=True)
"""


@pytest.mark.parametrize("ending", ["time.sleep(1000)", "time.sleep(0.5)"], ids=["killed", "ends"])
def test_nothing_outlives_the_parent(ending):
    parent = subprocess.Popen([sys.executable, "-c", PARENT + ending], stdout=subprocess.PIPE, text=True)
    pid, folder = parent.stdout.readline().split()
    zygote = psutil.Process(int(pid))
    assert wait_until(lambda: len(zygote.children(recursive=True)) >= 2)
    family = [zygote, *zygote.children(recursive=True)]
    if "1000" in ending: parent.kill()
    assert parent.wait(30) in (0, -signal.SIGKILL)
    parent.stdout.close()
    assert wait_until(lambda: all(gone(p.pid) for p in family)), [p for p in family if p.is_running()]
    assert wait_until(lambda: not os.path.exists(folder))


def test_forked_parent_gets_a_server_of_its_own():
    script = """
import os, sys, threading
from tirlab.sandbox import client as sandbox
from tirlab.sandbox.client import run_python
run_python("1"); first = next(iter(sandbox._servers.values())).process.pid
sandbox._lock.acquire()                       # as if another thread had been starting a server at this moment
if (child := os.fork()) == 0:
    ok = str(run_python("37 + 48")) == "85" and next(iter(sandbox._servers.values())).process.pid != first
    sandbox._end()
    os._exit(0 if ok else 1)
sandbox._lock.release()
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(code or not (str(run_python("2 + 2")) == "4" and next(iter(sandbox._servers.values())).process.pid == first))
"""
    result = python(script)
    assert result.returncode == 0, result.stderr


def test_forked_parent_leaves_interpreters_alone():
    script = """
import os, sys
from tirlab.sandbox import client as sandbox
from tirlab.sandbox.interpreters import Interpreter
one = Interpreter(preload="bare")
one.run("x = 37")
if os.fork() == 0:
    said = str(one.run("x"))
    sys.exit(not ("forked" in said and "NameError" in said))   # with whatever ends a process in good order
code = os.waitstatus_to_exitcode(os.wait()[1])
sys.exit(code or str(one.run("x")) != "37")
"""
    result = python(script)
    assert result.returncode == 0, result.stderr


def test_works_for_an_ordinary_user():
    user = {"user": "nobody", "cwd": "/"} if os.geteuid() == 0 else {}
    locked = "import os; os.makedirs('a/b'); os.chmod('a', 0); 85"
    script = f"""
import os, pathlib, sys
from tirlab.sandbox import client as sandbox
from tirlab.sandbox.client import run_python
import time
ok, folder = str(run_python({locked!r})) == "85", pathlib.Path(next(iter(sandbox._servers.values())).folder)
for _ in range(200): time.sleep(0.02 if list(folder.glob('*/*')) else 0)
ok = ok and not list(folder.glob('*/*'))
sys.exit(not (ok and run_python("[0] * 10**9").status == "memory"))
"""
    user["env"] = {"PYTHONPATH": str(Path(__file__).parents[2])}
    for program in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            python("import tirlab.sandbox.client", program, **user, check=True)
            break
    else: pytest.skip("there is no interpreter that an ordinary user may run")
    result = python(script, program, **user)
    assert result.returncode == 0, result.stderr


def test_server_that_cannot_start_is_one_clear_error():
    script = """
import sys
from tirlab.sandbox import client as sandbox
sandbox._stop(sandbox._start("process", "bare")), sandbox.probe()
sys.executable = "/bin/false"
try: sandbox.run_python("1")
except OSError as e: sys.exit("did not start" not in str(e))
"""
    result = python(script)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter is written for x86-64")
def test_locks_in_a_container_that_refuses_namespaces():
    "Emulated: no capabilities beyond Docker's default ones, and its filter's refusal of unshare, mount, setns, ptrace, keyctl and bpf."
    script = """
import ctypes, struct, sys
from tirlab.sandbox import client as sandbox, locks
refused = [272, 165, 308, 101, 250, 321]   # unshare, mount, setns, ptrace, keyctl, bpf
program = locks._op(locks._LOAD, 0) + b"".join(locks._op(locks._EQUAL, n, len(refused) - i) for i, n in enumerate(refused))
program += locks._end(locks._ALLOW) + locks._DENY
docker = 0xa80425fb if os.geteuid() == 0 else 0
ctypes.CDLL(None).capset(struct.pack("II", 0x20080522, 0), struct.pack("6I", docker, docker, 0, 0, 0, 0))
locks.apply_seccomp(locks.make_filter(program))
from tirlab.sandbox.client import run_python
assert str(run_python("37 + 48")) == "85"
assert "PermissionError" in run_python("open('/etc/passwd')").error and "PermissionError" in run_python("import socket; socket.socket()").error
try: run_python("1", isolation="namespaced")
except sandbox.IsolationError as e: print(e)
"""
    result = python("import os\n" + script)
    assert "(namespaces: Operation not permitted)" in result.stdout, result
