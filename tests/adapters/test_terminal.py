"""A terminal: odd commands after which the next works, limits, isolation, what is left behind, checks, training."""
import asyncio
import json
import os
import time
from dataclasses import replace

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tirlab.adapters.task_set import adapter_tasks
from tirlab.adapters.terminal import FAMILIES, TerminalEnvironment, terminal_environment
from tirlab.all import OffPolicy, TIRConfig, TIRTrainer, evaluate, open_run, tiny_policy
from tirlab.core.trajectory import ToolCall
from tirlab.rollout.calls import RolloutLimits, run_call
from tirlab.sandbox.client import _servers, missing
from tirlab.sandbox.executions import Limits
from tirlab.sandbox.shell_driver import command_lines, quote
from tirlab.sandbox.shells import Shell

QUICK = Limits(seconds=1, cpu_seconds=10)
NEW = "a new shell was started"


@pytest.fixture(scope="module")
def shell():
    with Shell(QUICK) as one: yield one


def said(shell, command): return str(shell.run(command))


# command, what the model reads (a part of it), whether bash keeps its variables (None: it depends on which limit is met first)
ODD = {
    "a pager": ("yes | head -3 | less", "y", True), "an editor": ("vi notes", "", True), "top": ("top", "", True), "read": ("read -p 'Sure? ' answer", "exit status 1", True),
    "cat without input": ("cat", "exit status 0", True), "a here-document": ("cat <<END\n$((1 + 1))\nEND", "2", True), "a here-document without an end": ("cat <<END\nhi", "hi", True),
    "an open quote": ("echo 'hi", "unexpected EOF", True), "an open bracket": ("if true; then", "unexpected end of file", True), "two lines": ("echo a\necho b", "a\nb", True),
    "a trailing backslash": ("echo a \\", "a", True), "a comment": ("echo a # b", "a", True), "an empty command": ("", "exit status 0", True), "only spaces": (" \n ", "exit status 0", True),
    "exit": ("exit 3", f"exit status 3; the shell ended, and {NEW}", False), "exec of a program": ("exec echo hi", NEW, False), "exec of a redirection": ("exec > out 2>&1; echo hi", "exit status 0", True),
    "exec of input": ("exec < /etc/passwd; read x; echo $x", "root", True), "set -e": ("set -e; false; echo after", NEW, False), "an unknown command": ("no-such-program", "command not found", True),
    "a signal to itself": ("kill -9 $$", NEW, False), "an interrupt of itself": ("kill -INT $$", "exit status 130", True), "a stop of itself": ("kill -STOP $$", "still running", True),
    "signals that are ignored": ("trap '' INT TERM; while :; do :; done", NEW, False), "a loop": ("while :; do :; done", "still running after 1 seconds", True),
    "a sleep": ("sleep 1000", "still running", True), "a program that ignores signals": ("bash -c 'trap \"\" INT TERM; while :; do sleep 0.1; done'", "still running", True),
    "a group that is signalled": ("kill 0; kill -9 -1; echo alive", "alive", True), "background": ("sleep 1000 &", "exit status 0", True), "disowned": ("(sleep 1000 & disown) > /dev/null", "exit status 0", True),
    "output without end": ("yes", "MB printed", True), "binary output": ("head -c 100 /dev/urandom; printf '\\0\\377'; echo; echo end", "end", True), "long lines": ("head -c 100000 /dev/zero | tr '\\0' x", "xxx", True),
    "fork bomb": (":() { :|:& }; :; sleep 5", "", None), "many processes": ("for i in $(seq 100); do sleep 50 & done", NEW, False), "echo in pieces": ("printf a; printf b >&2", "ab", True),
    "a prompt": ("PS1='> '; PROMPT_COMMAND='echo prompt'", "exit status 0", True), "job control": ("set -m; sleep 0.1 & fg", "", True), "its own descriptors": ("exec 3> three; echo x >&3; cat three", "x", True),
    "a broken pipe": ("yes | head -1", "y", True), "timeout": ("timeout 0.2 sleep 50", "exit status 124", True), "cd to nowhere": ("cd /nowhere", "No such file", True), "a NUL": ("echo a\0b", "NUL", True),
    "functions in the place of builtins": ("echo() { return 1; }; printf() { return 1; }; eval() { :; }; command true", "exit status 0", True),
}


@pytest.mark.parametrize("kind", ODD)
def test_after_an_odd_command_the_next_works(shell, kind):
    command, part, kept = ODD[kind]
    said(shell, "unset -f echo printf eval; set +e +m; trap - INT TERM; PS1=; PROMPT_COMMAND=; cd; kept=37; touch file")
    answer, start = said(shell, command), time.monotonic()
    assert part in answer
    if kept is not None: assert (NEW in answer) == (not kept)
    after = said(shell, "builtin echo \"${kept:-gone} $(ls file) $((20 + 3))\"")
    assert after.endswith(f"{'37' if kept else 'gone'} file 23") or kept is None and after.endswith(" file 23") and time.monotonic() < start + 10


def test_state_stays_from_command_to_command():
    with Shell(QUICK) as one:
        for command in ("mkdir -p a/b; cd a/b", "x='1 2'; f() { echo \"<$1>\"; }; alias hi='echo hi'; export Y=3", "echo kept > file"): one.run(command)
        assert said(one, "pwd; f \"$x\"; hi; bash -c 'echo $Y'; cat file") == "/sandbox/a/b\n<1 2>\nhi\n3\nkept"
        assert said(one, "cd /sandbox && ls -d /sandbox/a") == "/sandbox/a"


def test_a_command_is_one_word():
    text = bytes(range(1, 256))
    assert b"\n" not in quote(text) and b"'" not in quote(text)[2:-1] and command_lines(text, 1).count(b"\n") == 3


def test_the_same_commands_give_the_same_text():
    def transcript():
        with Shell() as one: return [said(one, c) for c in ("pwd; echo $HOME", "sleep 50 &", "yes | head -1", "ls -d ~; cat nothing; cd /sandbox/x")]
    assert transcript() == transcript()


def test_limits_hold():
    with Shell(replace(QUICK, memory_mb=64, file_mb=1, seconds=5)) as one:
        assert "exit status" in said(one, "python3 -c 'x = bytearray(10**9)'") and "MemoryError" in said(one, "python3 -c 'x = bytearray(10**9)'")
        assert "exit status" in said(one, "head -c 3000000 /dev/zero > big")
        assert said(one, "wc -c < big") == str(2**20)
    with Shell(replace(QUICK, disk_mb=2, seconds=10)) as one:
        full = said(one, "for i in 1 2 3 4; do head -c 1000000 /dev/zero > $i; done; sleep 3")
        assert "written to files" in full and "files, variables and functions are gone" in full and said(one, "ls; echo new") == "new"


def test_what_is_closed():
    with Shell() as one:
        for command in ("cat /etc/shadow", "ls /root", "cat /proc/1/environ", "touch /tmp/x", "echo x > /usr/bin/x", "exec 5<> /dev/tcp/127.0.0.1/80", "setsid true", "mkfifo p", "kill -0 1", "ps",
                        f"ls {os.path.dirname(__file__)}", f"kill -0 {os.getpid()}", "chmod 777 /usr/bin", "ln /etc/passwd hard"):
            assert "exit status" in said(one, command), command
        assert "exit status" in said(one, "python3 -c 'import socket; socket.socket()'")
        assert said(one, "diff <(seq 3) <(seq 3) && mkdir d && mv d e && ln -s e l && ls") == "e\nl"


@pytest.mark.parametrize("level", ["process", "locked", "namespaced"])
def test_every_level_of_isolation_runs_a_shell(level):
    if lacking := missing(level): pytest.skip(lacking)
    with Shell(QUICK, isolation=level) as one:
        assert [said(one, c) for c in ("x=37; cd /usr", "echo $x; pwd", "sleep 50")] == ["(exit status 0)", "37\n/usr", "(TimeoutError: still running after 1 seconds; it was stopped)"]
        one.run("sleep 1001 &")
        one.run("(sleep 1001 & sleep 1001 &)")
    assert not still("1001")


def still(word, seconds=10):
    "Return the processes with a word on their command line, once they had time to end."
    end = time.monotonic() + seconds
    def those(): return [p for p in psutil.process_iter(["cmdline"]) if word in (p.info["cmdline"] or [])]
    while those() and time.monotonic() < end: time.sleep(0.05)
    return those()


def test_nothing_is_left_behind():
    def files(): return {os.path.join(d, f) for key, s in list(_servers.items()) if key[1] == "bash" for d, _, fs in os.walk(s.folder) for f in fs if f == "left"}
    environment = TerminalEnvironment()
    environment.reset()
    environment.bash("sleep 1002 &")
    environment.bash("(bash -c 'trap \"\" TERM HUP; sleep 1002' &); nohup sleep 1002 > /dev/null 2>&1 &")
    environment.bash("touch left; mkdir -p a/b/c")
    assert files()
    environment._close()
    assert not still("1002")
    end = time.monotonic() + 10
    while files() and time.monotonic() < end: time.sleep(0.05)
    assert not files()


def test_shells_of_many_rollouts_are_apart():
    from concurrent.futures import ThreadPoolExecutor
    def one(i):
        with Shell() as mine: return [said(mine, c) for c in (f"echo {i} > mine; x={i}", "sleep 0.2; cat mine; echo $x; ls")][1]
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(one, range(16))) == [f"{i}\n{i}\nmine" for i in range(16)]


def test_status_and_text_reach_the_rollout():
    environment = TerminalEnvironment()
    environment.reset()
    call = lambda command: asyncio.run(run_call(ToolCall("bash", {"command": command}), {"bash": environment.bash}, RolloutLimits()))   # noqa: E731
    assert (call("echo hi").content, call("echo hi").status, call("false").status, call("false").error) == ("hi", "ok", "error", None)
    assert call(3).error is not None
    environment._close()


def test_checks_are_not_fooled():
    environment = TerminalEnvironment()
    for act, reward in (("echo 7 > sum", 1.0), ("echo 8 > sum", 0.0), ("test() { return 0; }; export -f test; cat() { echo 7; }; export -f cat; alias test=true; enable -n test; exec 2>&1", 0.0),
                        ("cat > .bashrc <<< 'test() { :; }'; cp .bashrc .bash_profile; BASH_ENV=.bashrc; export BASH_ENV; ENV=.bashrc; PATH=.", 0.0), ("(while :; do echo 8 > sum; done) & sleep 0.1; echo 7 > sum", None)):
        environment.reset(check="test \"$(cat sum)\" = 7")
        environment.bash(act)
        environment._close()
        assert environment.get_reward() == reward or reward is None
    environment.reset()
    environment._close()
    assert environment.get_reward() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_ground_truth_earns_its_reward_and_nothing_does_not(family):
    found = adapter_tasks(f"terminal/{family}", n=4, seed=3)
    for row in found.rows:
        for act in (True, False):
            environment = found.environment()
            environment.reset(**row)
            for call in row["ground_truth"] * act: environment.bash(**json.loads(call)["arguments"])
            environment._close()
            assert environment.get_reward() == float(act), row


def test_tasks_are_drawn_by_seed_and_splits_are_apart():
    draw = lambda **more: adapter_tasks("terminal/files", n=40, **more).rows.to_list()   # noqa: E731
    assert draw() == draw(split="train") and draw() != draw(seed=1) and {r["family"] for r in draw()} == set(FAMILIES)
    name = lambda rows: {(r["prompt"][0]["content"], r["files"]) for r in rows}   # noqa: E731
    assert not name(draw()) & name(draw(split="test"))
    for bad in (dict(name="terminal/flies"), dict(name="terminal/files", split="dev")):
        with pytest.raises(ValueError): adapter_tasks(**bad)
    with pytest.raises(ValueError): terminal_environment(isolation="none")


def test_two_steps_of_training_and_evaluation(tmp_path):
    found = adapter_tasks("terminal/count_files", n=4)
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), per_device_train_batch_size=4, num_generations=2, max_completion_length=256, max_turn_length=96, max_steps=2,
                     learning_rate=1e-4, save_strategy="no", disable_tqdm=True, report_to="none", seed=1)
    trainer = TIRTrainer(tiny_policy(), None, args, found.rows, environment_factory=found.environment, supervision=[OffPolicy(per_group=1)])
    trainer.train()
    batch = trainer.batch
    assert any(t.origin == "demonstration" and t.results[0].content == "(exit status 0)" for t in batch.trajectories)
    assert open_run(tmp_path / "run").status() == "finished" and batch.rewards.max() == 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_policy()), AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
    assert evaluate(model, tokenizer, found.rows, found.environment, limits=RolloutLimits(completion_tokens=64)).rewards == [0.0] * 4
