"""The command line: what the doctor says, and the stack it compares with."""

import re
from pathlib import Path

import pytest

from tirlab import cli

ROOT = Path(__file__).parent.parent


def test_the_stack_is_the_constraints_file():
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert {name: pinned[name] for name in cli.STACK} == cli.STACK


def test_a_healthy_machine_gets_exit_status_0(capsys, monkeypatch):
    monkeypatch.setattr(cli, "installed", {**cli.STACK, "vllm": None}.get)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Everything that is needed is here." in out and "sandbox" in out and "device" in out and re.search(r"vllm .*missing", out)


@pytest.mark.parametrize("have,word", [(None, "trl is missing"), ("1.15.0", "trl is 1.15.0, tirlab is tested with 1.16.0")])
def test_what_is_missing_is_said_plainly(have, word, capsys, monkeypatch):
    monkeypatch.setattr(cli, "installed", {**cli.STACK, "trl": have}.get)
    assert cli.main(["doctor"]) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(word) and "pip install" in last


def test_a_broken_sandbox_is_named(capsys, monkeypatch):
    from tirlab import sandbox
    monkeypatch.setattr(cli, "installed", cli.STACK.get)
    def broken(code):
        raise OSError("no processes left")
    monkeypatch.setattr(sandbox, "run_python", broken)
    assert cli.main(["doctor"]) == 1
    assert "The sandbox does not start (no processes left)" in capsys.readouterr().out


def test_unknown_commands_exit_with_2(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["dance"])
    assert e.value.code == 2 and "invalid choice: 'dance'" in capsys.readouterr().err
