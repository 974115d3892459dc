"""What untrusted code tries, as this user and as `nobody`, at each level of isolation, and where landlock is of its first version. Each attack must
fail, and the next execution must work. What the level `process` does not hold off is tested too, under names that begin with `test_process_does_not`."""
import contextlib
import functools
import itertools
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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fastcore
import psutil
import pytest

from tirlab.sandbox.client import missing

ROOT = Path(__file__).parents[2]
X86 = platform.machine() == "x86_64"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


# Who attacks

class Host:
    "A process that runs the sandbox, as some user; `abi` for what its servers take landlock's version to be."

    def __init__(self, user, abi=None):
        options, python = {}, sys.executable
        environment = {"PYTHONPATH": f"{ROOT}:{Path(fastcore.__file__).parent.parent}", "TIRLAB_SECRET": "hunter2", "PATH": os.environ["PATH"]}
        if user == "nobody":
            if os.geteuid(): pytest.skip("only root can become nobody")
            options = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            python = python_for_nobody() or pytest.skip("no Python 3.11 that nobody may run")
        command = [python, str(ROOT / "tests/sandbox_host.py"), *([abi] if abi else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=environment, **options)
        self.waiting, self.count = {}, itertools.count()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            answer = json.loads(line)
            self.waiting.pop(answer.pop("number")).set_result(answer)

    def submit(self, code, isolation, stays=False, **limits):
        "Begin an execution, or a turn of an interpreter that `stays`."
        number, future = next(self.count), Future()
        self.waiting[number] = future
        limits = dict(seconds=2) | limits
        request = dict(number=number, run=dict(code=textwrap.dedent(code), limits=limits, isolation=isolation, stays=stays))
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return future

    def __call__(self, *args, **kwargs): return self.submit(*args, **kwargs).result(60)

    def server(self):
        return self.process.pid, [p.pid for p in psutil.Process(self.process.pid).children(recursive=True)]


@functools.cache
def python_for_nobody():
    test = "import sys; sys.path.insert(0, sys.argv[1]); import tirlab.sandbox.client; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin"), shutil.which("python3.12"), shutil.which("python3.11")):
        try:
            if not python: continue
            tried = subprocess.run([python, "-c", test, str(ROOT)], user="nobody", cwd="/", env={}, capture_output=True, check=False)
            if not tried.returncode: return python
        except OSError: pass


@pytest.fixture(scope="module")
def hosts():
    made = {}
    def host(*who):
        if who not in made: made[who] = Host(*who)
        return made[who]
    yield host
    for h in made.values(): h.process.stdin.close(), h.process.wait(20)


@contextlib.contextmanager
def attacker(hosts, user, level, abi=None, replaced=False):
    "A function that runs code; afterwards the next execution must work, and unless it is to be replaced the server must be the same."
    if lacking := missing(level): pytest.skip(f"this machine cannot do {level}: {lacking}")
    host = hosts(user, abi)
    run = functools.partial(host, isolation=level)
    run.host, run.level = host, level
    assert run("37 + 48")["stdout"] == "85\n"
    _, family = host.server()
    yield run
    assert run("37 + 48")["stdout"] == "85\n", "the execution after the attack"
    if not replaced: assert until(lambda: host.server()[1] == family), "no server died, none was added, no process stayed"


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end: time.sleep(0.01)
    return value


LOCKED = ["me-locked", "nobody-locked", "me-namespaced", "nobody-namespaced"]


@pytest.fixture(params=LOCKED)
def run(request, hosts):
    with attacker(hosts, *request.param.split("-")) as run: yield run


@pytest.fixture(params=[*LOCKED, "me-locked-1", "nobody-locked-1"])
def anywhere(request, hosts):
    "On this kernel, and on one whose landlock is of version 1 (Linux 5.13), as far as that can be emulated."
    with attacker(hosts, *request.param.split("-")) as run: yield run


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
    "empty by reading": "os.open('/dev/null', os.O_RDONLY | os.O_TRUNC)",
    "empty by neither reading nor writing": "os.open({secret!r}, 3 | os.O_TRUNC)",
    "open for neither": "os.open({secret!r}, 3)",
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


def test_every_way_out_is_closed(anywhere, untouched):
    "One execution each; the table says what is tried."
    got, run = {}, anywhere
    for name, attack in ATTACKS.items():
        values = {k: v for k, v in untouched.items() if k != "sockets"} | {"host": run.host.process.pid}
        attack = attack.format(**values) if LIBC not in attack else attack
        code = f"import os\ntry:\n{textwrap.indent(attack, '    ')}\nexcept (OSError, ValueError): print('held')\nelse: print('GOT IN')"
        result = run(code)
        if result["stdout"] != "held\n": got[name] = result
    assert not got


def test_the_attacks_are_real(hosts, untouched):
    "Some that do no harm, where nothing is locked: all of them get in."
    for name in ("read outside", "list root", "read passwords", "read the project", "own memory", "other processes", "does it live", "fork", "exec",
                 "program in memory", "pidfd", "listen", "open for neither", "empty by reading"):
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


# A neighbour: another execution, in flight at the same moment

NEIGHBOUR = """
    import mmap, os, signal, socket, time
    caught = []
    for s in signal.valid_signals() - {9, 19}: signal.signal(s, lambda n, _: caught.append(n))
    secret = "hunter" + str(1 + 1)
    shared, (ours, theirs), notes = mmap.mmap(-1, 4096), socket.socketpair(), open('notes', 'w+')
    shared.write(secret.encode()), notes.write('37'), notes.flush(), os.mkdir('ready')
    try: socket.socket(socket.AF_UNIX).bind("\\0tirlab-neighbour")
    except OSError: pass
    while not os.path.exists('go'): time.sleep(0.005)
    theirs.send(b'48'), notes.seek(0)
    print(notes.read(), ours.recv(9), shared[:7], sorted(os.listdir()), caught)
"""
ANSWER = "37 b'48' b'hunter2' ['go', 'notes', 'ready'] []\n"
ON_PROCESS = {   # as before: each that comes to an end is one too many
    "memory": "open('/proc/{pid}/mem', 'rb')", "memory, to write": "open('/proc/{pid}/mem', 'r+b')", "thread": "open('/proc/{pid}/task/{pid}/mem', 'rb')",
    "environment": "open('/proc/{pid}/environ').read()", "arguments": "open('/proc/{pid}/cmdline').read()", "map": "open('/proc/{pid}/maps').read()",
    "status": "open('/proc/{pid}/status').read()", "descriptors": "os.listdir('/proc/{pid}/fd')", "output": "open('/proc/{pid}/fd/1', 'wb')",
    "report": "open('/proc/{pid}/fd/3', 'wb')", "output's name": "os.readlink('/proc/{pid}/fd/1')", "folder": "os.listdir('/proc/{pid}/cwd')",
    "folder's name": "os.readlink('/proc/{pid}/cwd')", "root": "os.listdir('/proc/{pid}/root')", "score": "open('/proc/{pid}/oom_score_adj', 'w')",
    "does it live": "os.kill({pid}, 0)", "stop": "os.kill({pid}, 19)", "kill": "os.kill({pid}, 9)", "signal": "os.kill({pid}, 10)",
    "kill its group": "os.killpg(os.getpgid({pid}), 9)", "pidfd": "os.pidfd_open({pid})", "pidfd_send_signal": "signal.pidfd_send_signal(3, 9)",
    "owner": "fcntl.fcntl(1, fcntl.F_SETOWN, {pid})", "priority": "os.setpriority(os.PRIO_PROCESS, {pid}, 5)",
    "affinity": "os.sched_setaffinity({pid}, {{0}})", "scheduler": "os.sched_setscheduler({pid}, os.SCHED_OTHER, os.sched_param(0))",
    "limits": "resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))", "its limits": "resource.prlimit({pid}, resource.RLIMIT_CPU)",
    "group": "os.setpgid({pid}, 0)",
}
ON_MEMORY = {
    "System V": "call(29, 1234, 4096, 0o1777)", "shared memory": "multiprocessing.shared_memory.SharedMemory('tirlab', True, 9)",
    "queue": "call(240, b'a', 66, 384, 0)", "memfd": "os.memfd_create('x')", "abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0tirlab-neighbour')",
    "message": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '\\0tirlab-neighbour')",
}
NUMBERS_ON_PROCESS = {   # on x86-64
    "tkill": "200, {pid}, 9", "tgkill": "234, {pid}, {pid}, 9", "sigqueue": "129, {pid}, 10, ctypes.create_string_buffer(128)",
    "thread's sigqueue": "297, {pid}, {pid}, 10, ctypes.create_string_buffer(128)", "attach": "101, 16, {pid}, 0, 0", "seize": "101, 0x4206, {pid}, 0, 0",
    "read memory": "310, {pid}, ctypes.create_string_buffer(16), 1, ctypes.create_string_buffer(16), 1, 0",
    "write memory": "311, {pid}, ctypes.create_string_buffer(16), 1, ctypes.create_string_buffer(16), 1, 0", "compare": "312, {pid}, {pid}, 0, 0, 0",
    "move pages": "279, {pid}, 0, 0, 0, 0, 0", "robust list": "274, {pid}, ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)",
    "descriptor": "438, 3, 1, 0", "advice": "440, 3, 0, 0, 0, 0", "disk priority": "251, 1, {pid}, 0", "namespace": "308, 3, 0",
}
if X86: ON_PROCESS |= {name: f"call({args})" for name, args in NUMBERS_ON_PROCESS.items()}
ON_FOLDER = {
    "read": "open('{home}/notes').read()", "write": "open('{home}/notes', 'w')", "append": "open('{home}/notes', 'a')", "list": "os.listdir('{home}')",
    "new": "open('{home}/new', 'w')", "let go": "os.mkdir('{home}/go')", "delete": "os.unlink('{home}/notes')", "delete folder": "os.rmdir('{home}/ready')",
    "delete all": "os.rmdir('{home}')", "rename": "os.rename('{home}/notes', '{home}/other')", "take": "os.rename('{home}/notes', 'mine')",
    "put": "open('mine', 'w'), os.rename('mine', '{home}/new')", "link": "os.symlink('/', '{home}/link')", "hard link": "os.link('{home}/notes', 'hard')",
    "through a link": "os.symlink('{home}', 'link'), open('link/notes')", "from inside": "os.chdir('{home}'), open('notes')",
    "empty": "os.truncate('{home}/notes', 0)", "empty, reading": "os.open('{home}/notes', os.O_TRUNC)", "empty, neither": "os.open('{home}/notes', 3 | os.O_TRUNC)",
    "attribute": "os.setxattr('{home}/notes', b'user.x', b'1')", "watch": "call(254, 3, b'{home}', 2)",
}
TRY = "import ctypes, fcntl, multiprocessing.shared_memory, os, resource, signal, socket\n" + LIBC + """
for name, attack in {attacks!r}.items():
    try: exec(attack)
    except OSError as e:
        if e.errno not in (1, 13): print(name, "failed by chance:", e)
    else: print(name, "GOT IN")
"""


@contextlib.contextmanager
def neighbours(run):
    "An execution and an interpreter in flight: process (as its siblings number it), folder. In the end both must give the right answer."
    running = [run.host.submit(NEIGHBOUR, run.level, stays, seconds=30) for stays in (False, True)]
    ready = lambda: [p for p in psutil.Process(run.host.process.pid).children(recursive=True) if os.path.exists(f"/proc/{p.pid}/cwd/ready")]
    assert until(lambda: len(ready()) == 2), [f.result() for f in running if f.done()]
    yield [(p, inner(p.pid), os.readlink(f"/proc/{p.pid}/cwd")) for p in ready()]
    assert not any(f.done() for f in running)
    for p in ready(): Path(f"/proc/{p.pid}/cwd/go").touch()
    assert [f.result(10)["stdout"] for f in running] == [ANSWER] * 2


def inner(pid):
    return int(Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].split("\n")[0].split()[-1])


def attack(run, table, **values):
    "Names of attacks that got in; one execution tries them all."
    return run(TRY.replace("{attacks!r}", repr({name: text.format(**values) for name, text in table.items()})))["text"]


def test_a_neighbour_and_the_server_are_out_of_reach(anywhere):
    run = anywhere
    with neighbours(run) as beside:
        server = beside[0][0].parent()
        look = lambda: [(p.pid, p.status() in ("zombie", "stopped", "tracing-stop"), p.nice(), p.cpu_affinity(), Path(f"/proc/{p.pid}/limits").read_text(),
                         sorted(os.listdir(f"/proc/{p.pid}/cwd"))) for p in (server, *(b[0] for b in beside))]
        assert attack(run, {}) == ""   # and the attacker has its folder
        before = look()
        for _, pid, home in beside:
            assert attack(run, ON_PROCESS, pid=pid) == ""
            assert attack(run, ON_FOLDER | ON_MEMORY, home=home) == ""
        assert attack(run, ON_PROCESS, pid=inner(server.pid)) == ""
        assert attack(run, {name: ON_FOLDER[name] for name in ("list", "new", "let go", "delete all", "link", "watch")}, home=Path(home).parent) == ""
        assert look() == before


def test_process_does_not_keep_neighbours_apart(hosts):
    "No promise of the level `process`; and a sign that these attacks are real. As the same user, nothing is between them."
    harmless = ["memory", "environment", "descriptors", "output's name", "folder", "does it live", "pidfd", "its limits"]
    with attacker(hosts, "me", "process") as run:
        with neighbours(run) as beside:
            for _, pid, home in beside:
                got = attack(run, {name: ON_PROCESS[name] for name in harmless}, pid=pid) + attack(run, {"read": ON_FOLDER["read"]}, home=home)
                assert got.count("GOT IN") == len(harmless) + 1, got
        killed = run.host.submit("import os, time; os.mkdir('ready'); time.sleep(30)", "process", seconds=30)
        victim = until(lambda: [p for p in psutil.Process(run.host.process.pid).children(recursive=True) if os.path.exists(f"/proc/{p.pid}/cwd/ready")])
        assert "kill GOT IN" in attack(run, {"kill": ON_PROCESS["kill"]}, pid=victim[0].pid)
        assert killed.result(10)["status"] == "crashed"


# Eating the machine

RESOURCES = {   # code, how it may end, limits; the slowest first
    "ignored limit": ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", ["timeout"], dict(seconds=20, cpu_seconds=1)),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ["timeout"], dict(seconds=0.3)),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", ["memory"], dict(memory_mb=200)),
    "memory at once": ("bytearray(10**11)", ["memory"], {}),
    "loop": ("while True: pass", ["timeout"], dict(seconds=0.15)),
    "loop in C": ("9**9**9", ["timeout"], dict(seconds=0.15)),
    "ignored signals": ("import signal\nfor s in set(signal.valid_signals()) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass", ["timeout"], dict(seconds=0.15)),
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
    "C stack": ("import itertools\nx = []\nfor _ in range(4 * 10**5): x = itertools.chain(x)\nnext(x)", ["crashed"], dict(memory_mb=1000)),
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
    "exception that never prints": ("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", ["timeout"], dict(seconds=0.15)),
    "input": ("input()", ["error"], {}),
    "pickle for the parent": ("import os, pickle\nclass P:\n    def __reduce__(self): return os.mkdir, ('/tmp/tirlab-pickled',)\n"
        "os.write(3, pickle.dumps(P())); os.write(1, pickle.dumps(P()))", ["ok"], {}),
    "reports without end": ("import os\nwhile True: os.write(3, b'f' * 60000)", ["timeout"], dict(seconds=0.15)),
    "no streams": ("import os; os.closerange(0, 1000)\nwhile True: pass", ["timeout"], dict(seconds=0.15)),
    "many descriptors": ("x = []\nwhile True: x.append(open('/dev/null'))", ["error"], {}),
    "many pipes": ("import os\nwhile True: os.pipe()", ["error"], {}),
    "file with a hole": ("open('big', 'w').truncate(10**13)", ["error"], {}),
    "higher limits": ("import resource as r\nfor n in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE): r.setrlimit(n, (10**12, 10**12))",
        ["error"], {}),
    "stops itself": ("import os; os.kill(os.getpid(), 19)", ["timeout"], dict(seconds=0.15)),
}
UNBOUNDED = {   # what would really harm the machine at the level `process`
    "fork bomb": "the level `process` does not hold this off: code may start processes, and nobody counts them; see test_process_does_not_count_processes",
}


SLOW = {   # two seconds of a processor's; the limit itself is in test_sandbox.py
    "ignored limit": "rlimits are the same at every level: tried without landlock and seccomp as this user, with them as nobody",
}


@pytest.fixture(scope="module", params=["me-process", "me-locked", "nobody-locked", "nobody-namespaced"])
def eaten(request, hosts):
    "What came of all of them, four at a time, each with the execution after it, and of those that only wanted to work beside them."
    user, level = request.param.split("-")
    results, work = {}, []
    with attacker(hosts, user, level) as run, ThreadPoolExecutor(5) as pool:
        def one(name):
            code, _, limits = RESOURCES[name]
            results[name] = run(code, **dict(seconds=10) | limits), run("37 + 48", seconds=10)["stdout"]
        def honest(going):
            while going(): work.append(run("import time; time.sleep(0.02); print(sum(range(10**5)))", seconds=10)["stdout"])
        left_out = UNBOUNDED if level == "process" else SLOW if request.param in ("me-locked", "nobody-namespaced") else ()
        attacks = [pool.submit(one, name) for name in RESOURCES if name not in left_out]
        beside = pool.submit(honest, lambda: not all(a.done() for a in attacks))
        for a in [*attacks, beside]: a.result(60)
    assert set(work) == {"4999950000\n"}
    return results


@pytest.mark.parametrize("name", RESOURCES)
def test_the_machine_survives(eaten, name):
    if name not in eaten: pytest.skip((UNBOUNDED | SLOW)[name])
    result, after = eaten[name]
    assert result["status"] in RESOURCES[name][1], result
    assert result["seconds"] < RESOURCES[name][2].get("seconds", 10) + 5 and after == "85\n"
    assert not os.path.exists("/tmp/tirlab-pickled")


def test_process_does_not_count_processes(hosts):
    "No promise of the level `process`: however many are started, daemons among them, they run, each with all the limits for itself. They are ended."
    code = """
        import os, time
        for i in range(40):
            if os.fork() == 0: os.setsid() if i % 2 else None; bytearray(10**7); open(str(i), 'w'); time.sleep(100)
        while len(os.listdir()) < 40: time.sleep(0.01)
        print('all of them')
    """
    with attacker(hosts, "me", "process") as run: assert run(code, seconds=10, memory_mb=40)["text"] == "all of them"


def test_process_does_not_count_files_elsewhere(hosts, tmp_path):
    "No promise of the level `process`: limits on disk are those of the scratch folder, and files may be written anywhere."
    code = f"import time; open('{tmp_path}/big', 'wb').write(b'0' * 5 * 2**20); time.sleep(0.6); print('written')"
    with attacker(hosts, "me", "process") as run: assert run(code, disk_mb=1)["text"] == "written"
    assert (tmp_path / "big").stat().st_size == 5 * 2**20


def test_where_memory_runs_out_executions_go_first(hosts):
    with attacker(hosts, "me", "process") as run:
        pids = [p.pid for p in psutil.Process(run.host.process.pid).children()]
        assert pids and all(Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n" for pid in pids)


def test_random_numbers_differ(run):
    code = "import random, uuid; random.random(), uuid.uuid4()"
    assert len({run(code)["stdout"] for _ in range(5)}) == 5


def test_numpy_numbers_differ(hosts):
    if lacking := missing("locked"): pytest.skip(f"this machine cannot do locked: {lacking}")
    pytest.importorskip("numpy")
    answers = {hosts("me")("import numpy as np; np.random.rand()", "locked", seconds=20)["stdout"] for _ in range(4)}
    assert len(answers) == 4


@pytest.mark.parametrize("who", ["me-process", *LOCKED])
def test_a_server_killed_in_flight(hosts, who):
    "Whoever waits is told that the sandbox failed; the next execution works; nothing hangs."
    with attacker(hosts, *who.split("-"), replaced=True) as run:
        code = "import os, time; os.mkdir('ready'); time.sleep(20)"
        calls = [run.host.submit(code, run.level, stays, seconds=30) for stays in (False, False, False, True)]
        begun = lambda: [p for p in psutil.Process(run.host.process.pid).children(recursive=True) if os.path.exists(f"/proc/{p.pid}/cwd/ready")]
        assert until(lambda: len(begun()) == 4)
        server = begun()[0].parent()
        family = [server, *server.children(recursive=True)]
        server.kill()
        assert [c.result(15)["status"] for c in calls] == ["lost"] * 4
        alive = lambda: [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert until(lambda: not alive()), "its executions and helpers went with it"
