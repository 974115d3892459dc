"""What untrusted code tries, as this user and as `nobody`, locked and namespaced. Each attack must fail, and the next execution must work."""
import contextlib
import functools
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from tirlab.sandbox import missing

ROOT = Path(__file__).parent.parent
X86 = platform.machine() == "x86_64"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


# Who attacks

class Host:
    "A process that runs the sandbox, as some user."

    def __init__(self, user):
        options, python = {}, sys.executable
        environment = {"PYTHONPATH": str(ROOT), "TIRLAB_SECRET": "hunter2", "PATH": os.environ["PATH"]}
        if user == "nobody":
            if os.geteuid(): pytest.skip("only root can become nobody")
            options = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            python = python_for_nobody() or pytest.skip("no Python 3.11 that nobody may run")
        command = [python, str(ROOT / "tests/sandbox_host.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=environment, **options)

    def __call__(self, code, isolation, **limits):
        request = dict(code=textwrap.dedent(code), limits=dict(seconds=2) | limits, isolation=isolation)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def server(self):
        return self.process.pid, [p.pid for p in psutil.Process(self.process.pid).children(recursive=True)]


@functools.cache
def python_for_nobody():
    test = "import sys; sys.path.insert(0, sys.argv[1]); import tirlab.sandbox; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin"), shutil.which("python3.12"), shutil.which("python3.11")):
        try:
            if not python: continue
            tried = subprocess.run([python, "-c", test, str(ROOT)], user="nobody", cwd="/", env={}, capture_output=True, check=False)
            if not tried.returncode: return python
        except OSError: pass


@pytest.fixture(scope="module")
def hosts():
    made = {}
    def host(user):
        if user not in made: made[user] = Host(user)
        return made[user]
    yield host
    for h in made.values(): h.process.stdin.close(), h.process.wait(20)


@contextlib.contextmanager
def attacker(hosts, user, level, replaced=False):
    "A function that runs code; afterwards the next execution must work, and unless it is to be replaced the server must be the same."
    if lacking := missing(level): pytest.skip(f"this machine cannot do {level}: {lacking}")
    host = hosts(user)
    run = functools.partial(host, isolation=level)
    run.host, run.level = host, level
    assert run("37 + 48")["stdout"] == "85\n"
    _, family = host.server()
    yield run
    assert run("37 + 48")["stdout"] == "85\n", "the execution after the attack"
    if not replaced: assert host.server()[1] == family, "no server died, none was added, no process stayed"


@pytest.fixture(params=["me-locked", "nobody-locked", "me-namespaced", "nobody-namespaced"])
def run(request, hosts):
    with attacker(hosts, *request.param.split("-"), replaced="killed_in_flight" in request.node.name) as run: yield run


@pytest.fixture(params=["me", "nobody"])
def locked(request, hosts):
    "For attacks on resources, which take a while and have nothing to do with namespaces."
    with attacker(hosts, request.param, "locked") as run: yield run


# What they want

@pytest.fixture(scope="module")
def victim():
    "A file that anybody may read and write, if only he can reach it, and sockets that anybody may talk to."
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    (folder / "secret").write_text("hunter2")
    (folder / "secret").chmod(0o666)
    tcp, udp, path, abstract, datagram = (socket.socket(f, k) for f, k in [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)])
    tcp.bind(("127.0.0.1", 0)), udp.bind(("127.0.0.1", 0)), path.bind(f"{folder}/s")
    abstract.bind(f"\0tirlab-{os.getpid()}"), datagram.bind(f"{folder}/d")
    for s in (tcp, path, abstract): s.listen()
    for s in (tcp, udp, path, abstract, datagram): s.setblocking(False)
    for name in "sd": (folder / name).chmod(0o777)
    yield dict(folder=str(folder), secret=f"{folder}/secret", tcp=tcp.getsockname()[1], udp=udp.getsockname()[1], abstract=f"\0tirlab-{os.getpid()}",
               sockets=[tcp, udp, path, abstract, datagram])
    for s in (tcp, udp, path, abstract, datagram): s.close()
    shutil.rmtree(folder)


@pytest.fixture
def untouched(victim):
    "Nothing about the victim has changed afterwards."
    def look():
        s, path = os.stat(victim["secret"]), Path(victim["secret"])
        return s.st_mode, s.st_uid, s.st_mtime, s.st_nlink, path.read_text(), sorted(os.listdir(victim["folder"])), os.listxattr(path)
    before = look()
    yield victim
    assert look() == before
    for s in victim["sockets"]:
        with pytest.raises(BlockingIOError): s.recv(1) if s.type == socket.SOCK_DGRAM else s.accept()


LIBC = ("import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(*args):\n    if libc.syscall(*args) == -1: raise OSError(ctypes.get_errno(), 'refused')\n")
ATTACKS = {   # each line of code that gets through without an OSError is one too many
    "read outside": "open({secret!r}).read()",
    "list outside": "os.listdir({folder!r})",
    "list root": "os.listdir('/')",
    "read passwords": "open('/etc/passwd').read()",
    "read home": "os.listdir(os.path.expanduser('~root'))",
    "read the project": f"os.listdir({str(ROOT)!r})",
    "write outside": "open({secret!r}, 'w')",
    "append outside": "open({secret!r}, 'a')",
    "new file outside": "open({folder!r} + '/new', 'w')",
    "new file in tmp": "open('/tmp/tirlab-new', 'w')",
    "new file in shared memory": "open('/dev/shm/tirlab-new', 'w')",
    "new folder outside": "os.mkdir({folder!r} + '/new')",
    "delete outside": "os.unlink({secret!r})",
    "take away": "os.rename({secret!r}, 'mine')",
    "put outside": "open('mine', 'w').close(); os.rename('mine', {folder!r} + '/new')",
    "truncate outside": "os.truncate({secret!r}, 0)",
    "read through a symlink": "os.symlink({secret!r}, 'link'); open('link').read()",
    "write through a symlink": "os.symlink({folder!r}, 'link2'); open('link2/new', 'w')",
    "read through a hard link": "os.link({secret!r}, 'hard'); open('hard').read()",
    "write through a hard link": "os.link({secret!r}, 'hard2'); open('hard2', 'w')",
    "extended attribute": "os.setxattr({secret!r}, b'user.x', b'1')",
    "device": "os.mknod('null', 0o20666, os.makedev(1, 3))",
    "named pipe": "os.mkfifo('pipe')",
    "parent's environment": "open(f'/proc/{{os.getppid()}}/environ').read()",
    "parent's memory": "open(f'/proc/{{os.getppid()}}/mem', 'rb')",
    "parent's descriptors": "os.listdir(f'/proc/{{os.getppid()}}/fd')",
    "host's environment": "open('/proc/{host}/environ').read()",
    "own memory": "open('/proc/self/mem', 'rb')",
    "other processes": "os.listdir('/proc')",
    "other runs": "os.listdir('..')",
    "another run's file": "open('../0/notes')",
    "TCP": "import socket; socket.create_connection(('127.0.0.1', {tcp}))",
    "UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {udp}))",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect({folder!r} + '/s')",
    "abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect({abstract!r})",
    "addressed datagram": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', {folder!r} + '/d')",
    "addressed message": "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, {folder!r} + '/d')",
    "raw socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "kill the server": "os.kill(os.getppid(), 9)",
    "kill the host": "os.kill({host}, 9)",
    "does it live": "os.kill({host}, 0)",
    "signal everybody": "os.kill(-1, 0)",
    "signal the group": "os.killpg(os.getpgid(0), 0)",
    "pidfd": "os.close(os.pidfd_open(os.getppid()))",
    "signal by ownership": "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "priority": "os.setpriority(os.PRIO_PROCESS, 0, 5)",
    "affinity of the server": "os.sched_setaffinity(os.getppid(), {{0}})",
    "limits of the server": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "fork": "os._exit(0) if os.fork() == 0 else None",
    "daemon": "import multiprocessing as m; m.get_context('fork').Process(target=os.setsid).start()",
    "new session": "os.setsid()",
    "exec": "os.execv('/bin/true', ['true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "shell": "import subprocess; subprocess.run(['true'])",
    "program in memory": "os.memfd_create('x')",
    "become root": "os.setuid(0) if os.getuid() else os.setuid(65534)",
    "more memory": "import resource; s, h = resource.getrlimit(resource.RLIMIT_AS); r = resource.setrlimit(resource.RLIMIT_AS, (2 * h, 2 * h))",
    "chroot": "os.chroot('.')",
    "inotify": LIBC + "if libc.inotify_init() == -1: raise OSError",
    "ptrace": LIBC + "if libc.ptrace(16, os.getppid(), 0, 0) == -1: raise OSError",
    "outlive the server": LIBC + "if libc.prctl(1, 0) == -1: raise OSError",
    "new user namespace": LIBC + "if libc.unshare(0x10000000) == -1: raise OSError",
}
NUMBERS = {   # by number on x86-64, as the C library has no function for them, or checks more than the kernel does
    "io_uring": "425, 8, ctypes.create_string_buffer(256)", "bpf": "321, 0, 0, 0", "keyctl": "250, 0, -3, 0", "userfaultfd": "323, 0",
    "perf_event_open": "298, 0, 0, -1, -1, 0", "vfork": "58", "clone3": "435, ctypes.create_string_buffer(88), 88",
    "process_vm_readv": "310, os.getppid(), 0, 0, 0, 0, 0", "execveat": "322, -100, b'/bin/true', 0, 0, 0",
    "mount": "165, b'none', b'/', 0, 1 << 18, 0", "open_tree": "428, -100, b'/', 1", "pidfd_getfd": "438, 3, 0, 0",
    "add_key": "248, b'user', b'a', b'b', 1, -3", "mq_open": "240, b'a', 66, 384, 0", "shmget": "29, 0, 4096, 512",
    "sched_setscheduler": "144, 0, 0, ctypes.create_string_buffer(8)", "x32 getpid": "0x40000000 + 39", "seccomp": "317, 0, 0, 0",
    "landlock": "444, 0, 0, 1", "kexec": "246, 0, 0, 0, 0", "unknown": "999",
}
if X86: ATTACKS |= {name: LIBC + f"call({args})" for name, args in NUMBERS.items()}
UNDONE = {   # allowed to seem to succeed, and nothing happens
    "mode": "os.chmod({secret!r}, 0)", "times": "os.utime({secret!r}, (1, 1))", "owner": "os.chown({secret!r}, 65534, 65534)",
    "mode by descriptor": "os.chmod('/dev/null', 0)",
}


def test_every_way_out_is_closed(run, untouched):
    "One execution each; the table says what is tried."
    got = {}
    for name, attack in ATTACKS.items():
        values = {k: v for k, v in untouched.items() if k != "sockets"} | {"host": run.host.process.pid}
        attack = attack.format(**values) if LIBC not in attack else attack
        code = f"import os\ntry:\n{textwrap.indent(attack, '    ')}\nexcept (OSError, ValueError): print('held')\nelse: print('GOT IN')"
        result = run(code)
        if result["stdout"] != "held\n": got[name] = result
    assert not got


def test_the_attacks_are_real(hosts, untouched):
    "Some that do no harm, where nothing is locked: all of them get in."
    for name in ("read outside", "list root", "read passwords", "read the project", "parent's environment", "own memory", "other processes",
                 "does it live", "fork", "exec", "program in memory", "pidfd", "listen"):
        attack = ATTACKS[name].format(secret=untouched["secret"], host=hosts("me").process.pid)
        assert "held" not in hosts("me")(f"import os\ntry:\n    {attack}\nexcept OSError: print('held')", "process")["stdout"], name


def test_what_seems_to_succeed_does_not_happen(run, untouched):
    null = os.stat("/dev/null").st_mode
    for attack in UNDONE.values(): assert run("import os; " + attack.format(secret=untouched["secret"]))["status"] == "ok"
    assert os.stat("/dev/null").st_mode == null


def test_what_is_still_possible(run):
    "Only metadata, as the documentation says; and what harmless code needs."
    assert run("import os; os.stat('/etc/passwd').st_size > 0")["stdout"] == "True\n"
    code = """
        import asyncio, shutil, sqlite3, tempfile, threading, os, json, concurrent.futures as cf
        open('a', 'w').write('37'); shutil.copy('a', 'b'); os.makedirs('c/d'); os.rename('b', 'c/d/b'); os.symlink('a', 'l'); open('l').read()
        with tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('1')
        with cf.ThreadPoolExecutor(4) as p: assert list(p.map(abs, range(4))) == [0, 1, 2, 3]
        async def f(): await asyncio.sleep(0.01); return 48
        assert asyncio.run(f()) == 48
        db = sqlite3.connect('x.db'); db.execute('create table t (a)'); db.execute('insert into t values (1)'); db.commit()
        import random, uuid, secrets, zoneinfo, datetime; zoneinfo.ZoneInfo('Europe/Berlin') if os.path.exists('/usr/share/zoneinfo') else None
        os.getcwd() == os.path.abspath(os.path.expanduser('~'))
    """
    assert run(code)["text"] == "True"


def test_environment_holds_nothing_of_ours(run):
    assert "hunter2" not in run("import os, sys; dict(os.environ), sys.argv, sys.path")["text"]
    assert run(f"import sys; {str(ROOT)!r} in sys.path")["stdout"] == "False\n"


@pytest.mark.skipif(not X86, reason="machine code for x86-64")
def test_system_calls_of_another_architecture_are_fatal(run):
    code = """
        import ctypes, mmap
        m = mmap.mmap(-1, 4096, prot=7)
        m.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))   # getpid of 32-bit x86
        print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())
    """
    assert run(code)["status"] == "crashed"


# Eating the machine

RESOURCES = {
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ["timeout"], dict(seconds=0.5)),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", ["memory"], {}),
    "memory at once": ("bytearray(10**11)", ["memory"], {}),
    "loop": ("while True: pass", ["timeout"], dict(seconds=0.3)),
    "loop in C": ("9**9**9", ["timeout"], dict(seconds=0.3)),
    "processor time": ("while True: pass", ["timeout"], dict(seconds=20, cpu_seconds=1)),
    "ignored signals": ("import signal\nfor s in set(signal.valid_signals()) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass", ["timeout"], dict(seconds=0.3)),
    "ignored limit": ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", ["timeout"], dict(seconds=20, cpu_seconds=1)),
    "flood": ("while True: print('spam' * 1000)", ["flood"], {}),
    "flood of errors": ("import os\nwhile True: os.write(2, b'spam' * 1000)", ["flood"], {}),
    "huge file": ("f = open('big', 'wb')\nwhile True: f.write(b'0' * 10**6)", ["error"], {}),
    "full disk": ("import itertools\nfor i in itertools.count(): open(str(i), 'wb').write(b'0' * 10**7)", ["flood"], {}),
    "full disk without names": ("import os\nkept = []\n"
        "while True: kept.append(open('x', 'wb', 0)); os.unlink('x'); kept[-1].write(b'0' * 10**7)", ["flood", "error"], dict(disk_mb=32)),
    "many small files": ("import itertools\nfor i in itertools.count(): open(str(i), 'w').close()", ["flood"], {}),
    "many folders, deep": ("import os\nwhile True: os.mkdir('d' * 100); os.chdir('d' * 100)", ["flood"], {}),
    "many threads": ("import threading, time\nthreading.stack_size(65536)\nwhile True:\n"
        "    try: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n    except RuntimeError: time.sleep(0.01)", ["flood"], {}),
    "threads that outlive": ("import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()\n1", ["ok"], {}),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", ["error"], {}),
    "C stack": ("import itertools\nx = []\nfor _ in range(10**6): x = itertools.chain(x)\nnext(x)", ["crashed"], dict(memory_mb=2000)),
    "C stack, by the parser": ("eval('(' * 10**6)", ["error", "crashed", "memory"], {}),
    "C stack, by a call": ("import ctypes, sys\nsys.setrecursionlimit(10**9)\nF = ctypes.CFUNCTYPE(None)\ndef f(): g()\ng = F(f)\n"
        "g()", ["crashed", "memory", "error"], {}),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", ["crashed"], {}),
    "abort": ("import os; os.abort()", ["crashed"], {}),
    "kill itself": ("import os; os.kill(os.getpid(), 9)", ["crashed"], {}),
    "_exit": ("import os; os._exit(3)", ["error"], {}),
    "exit 0": ("import sys; sys.exit()", ["ok"], {}),
    "exit 1": ("import sys; sys.exit(1)", ["error"], {}),
    "exit with words": ("raise SystemExit('no idea')", ["error"], {}),
    "exception in __del__": ("class A:\n    def __del__(self): raise ValueError('late')\na = A(); del a; print(1)", ["ok"], {}),
    "exception that cannot be printed": ("class E(Exception):\n    def __str__(self): raise self\nraise E", ["error"], {}),
    "exception that never prints": ("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", ["timeout"], dict(seconds=0.3)),
    "input": ("input()", ["error"], {}),
    "pickle for the parent": ("import os, pickle\nclass P:\n    def __reduce__(self): return os.mkdir, ('/tmp/tirlab-pickled',)\n"
        "os.write(3, pickle.dumps(P())); os.write(1, pickle.dumps(P()))", ["ok"], {}),
    "reports without end": ("import os\nwhile True: os.write(3, b'f' * 60000)", ["timeout"], dict(seconds=0.3)),
    "no streams": ("import os; os.closerange(0, 1000)\nwhile True: pass", ["timeout"], dict(seconds=0.3)),
}


@pytest.mark.parametrize("name", RESOURCES)
def test_the_machine_survives(locked, name):
    code, statuses, limits = RESOURCES[name]
    start = time.monotonic()
    result = locked(code, **limits)
    assert result["status"] in statuses, result
    assert time.monotonic() - start < 12
    assert not os.path.exists("/tmp/tirlab-pickled")


def test_random_numbers_differ(run):
    code = "import random, uuid; random.random(), uuid.uuid4()"
    assert len({run(code)["stdout"] for _ in range(5)}) == 5


def test_numpy_numbers_differ(hosts):
    if lacking := missing("locked"): pytest.skip(f"this machine cannot do locked: {lacking}")
    pytest.importorskip("numpy")
    answers = {hosts("me")("import numpy as np; np.random.rand()", "locked", seconds=20)["stdout"] for _ in range(4)}
    assert len(answers) == 4


def test_a_server_killed_in_flight(run):
    "Whoever waits is told that the sandbox failed; the next execution works; nothing hangs."
    results = []
    thread = threading.Thread(target=lambda: results.append(run.host("import time; time.sleep(20)", run.level, seconds=30)))
    thread.start()
    time.sleep(0.7)
    children = psutil.Process(run.host.process.pid).children(recursive=True)
    server = [p for p in children if p.ppid() == run.host.process.pid and run.level in p.cmdline() and "bare" in p.cmdline()]
    family = [q for p in server for q in (p, *p.children(recursive=True))]
    for p in server: p.kill()
    thread.join(15)
    assert results and results[0]["status"] == "lost"
    end = time.monotonic() + 10
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family) and time.monotonic() < end: time.sleep(0.05)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "its executions and helpers went with it"
    assert run("37 + 48")["stdout"] == "85\n"
