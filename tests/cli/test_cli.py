"""The command line: what the doctor says, and the stack it compares with."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tirlab.cli import main as cli
from tirlab.recipes import arguments, training

ROOT = Path(__file__).parents[2]


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
    from tirlab.sandbox import client as sandbox
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


# ---- bad input: a command, and a piece of the one sentence that answers it

@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder with things that are no checkpoint, no run and no settings; nothing trains here, and the network is not asked."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a file ü").write_text("x")
    (tmp_path / "an empty folder").mkdir()
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x81")
    (tmp_path / "empty.jinja").write_text(" ")
    for folder in ("run", "out/run-1", "out/checkpoint-5", "out/checkpoint-10"): (tmp_path / folder).mkdir(parents=True)
    for folder in ("run", "out/run-1"): (tmp_path / folder / "meta.json").write_text("{}")
    for folder in ("out/checkpoint-5", "out/checkpoint-10"): (tmp_path / folder / "config.json").write_text("{}")
    os.utime(tmp_path / "out/checkpoint-5", (0, 0))
    def train(self, *args, **kwargs): raise AssertionError("training began")
    monkeypatch.setattr(training.TIRTrainer, "train", train)
    return tmp_path


BAD = [
    ([], "the following arguments are required: COMMAND. See tirlab --help."),
    (["dance"], "invalid choice: 'dance'"),
    (["doctor", "now"], "unrecognized arguments: now"),
    *[(["demo", *w], said) for w, said in [
        (["--steps", "0"], "--steps: '0' is not a whole number from 1"), (["--steps", "many"], "--steps: 'many'"), (["--steps", "1" * 40], "is not a whole number from 1"), (["--steps", "²"], "is not a whole number"),
        (["--seed", "-1"], "Seed must be between 0"), (["--advantage", "x"], "--advantage: invalid choice"), (["--out", "a file ü"], "a file ü is a file"), (["--out", "a file ü/x"], "a file ü"),
        (["--out", "/proc/x"], "/proc/x"), (["--what"], "unrecognized arguments: --what")]],
    *[(["train", *w], said) for w, said in [
        (["model=/nowhere"], "model=/nowhere: there is no such folder"), (["model=an empty folder"], "holds no checkpoint: there is no config.json in it"), (["model=a file ü"], "is a file; give the folder of a checkpoint"),
        (["model=out"], "give the checkpoint inside: model=out/checkpoint-10"), (["model=out/run-1"], "give the checkpoint inside: model=out/checkpoint-10"), (["model=run"], "is the folder of a run, which kept no checkpoint"),
        (["model=nobody/nothing"], "model=nobody/nothing cannot be loaded"), (["model="], "model= has no value"), (["=x"], "Unknown setting ''"), (["recipe"], "'recipe' is not key=value."),
        (["gamma=1", "gamma=0.5"], "gamma is given twice"), (["ünï=1"], "Unknown setting 'ünï'; the nearest is"), (["chat_templat=x"], "the nearest is chat_template."),
        (["max_steps=0"], "max_steps=0 is not a number from 1 on"), (["max_steps=1e400"], "max_steps=1e400"), (["max_steps=" + "9" * 40], "is not a number from 1 on"), (["max_steps=-5"], "max_steps=-5 is not"),
        (["learning_rate=fast"], "learning_rate=fast should be a number."), (["learning_rate=nan"], "learning_rate=nan is not a number from 0 on"), (["learning_rate=-1"], "learning_rate=-1 is not"),
        (["n=²"], "n=² should be a whole number"), (["seed=-1"], "seed=-1 is not"), (["per_device_train_batch_size=0"], "is not a number from 1 on"), (["gradient_accumulation_steps=0"], "is not a number from 1 on"),
        (["temperature=0"], "temperature=0 is not a number above 0"), (["save_steps=0"], "save_steps=0 is not"), (["loss_type=foo"], "loss_type='foo' is unknown; choose one of grpo, "), (["optim=foo"], "optim=foo is unknown"),
        (["accuracy_band=[0.1"], "accuracy_band=[0.1 is no list"), (["accuracy_band=[a,b]"], "accuracy_band=a should be a number."), (["trace=maybe"], "trace=maybe should be true or false"),
        (["model_init_kwargs=abc"], "model_init_kwargs=abc should be names with values"), (["model_init_kwargs={"], "model_init_kwargs={ should be names with values"), (['model_init_kwargs={"a":1}'], "These settings make no trainer: "),
        (["config=an empty folder"], "config=an empty folder is a folder"), (["config=broken.yaml"], "broken.yaml is not YAML"), (["config=list.yaml"], "holds no lines of the form key: value."), (["config=bytes.yaml"], "bytes.yaml is not text in UTF-8."),
        (["config=/no/where"], "/no/where: No such file or directory."), (["report_to=nonsense"], "report_to=nonsense is unknown"), (["output_dir=a file ü"], "a file ü is a file; give another folder."), (["output_dir=a file ü/x"], "is a file"),
        (["run_dir=a file ü/x"], "run_dir=a file ü/x: "), (["chat_template=/no.jinja"], "chat_template=/no.jinja is no file that can be read, and no template either"), (["chat_template=empty.jinja"], "is an empty file"),
        (["call_format=yaml"], "call_format='yaml' is unknown"), (["recipe=tool_rl_box/ets", "sft_learning_rate=nan"], "sft_learning_rate=nan is not"), (["--resme"], "unrecognized arguments: --resme"),
        (["recipe=gtpo", "--resume", "gama=1"], "Unknown setting 'gama'"), (["--resume", "output_dir=an empty folder", "learning_rate=1"], "There is nothing to resume in an empty folder")]],
    *[(["sandbox", *w], said) for w, said in [
        ([], "arguments are required: ACTION"), (["stop"], "invalid choice: 'stop'"), (["serve", "--port", "99999"], "--port: '99999' is not a port"), (["serve", "--port", "-1"], "--port: '-1' is not a port"),
        (["serve", "--port", "web"], "--port: 'web' is not a port"), (["serve", "--host", "8.8.8.8"], "set a token"), (["serve", "--isolation", "x"], "--isolation: invalid choice")]],
    *[(["drift-check", *w], said) for w, said in [
        (["--model", "/nowhere"], "there is no such folder"), (["--model", "a file ü"], "is a file"), (["--model", "an empty folder"], "holds no checkpoint"), (["--model", "out"], "model=out/checkpoint-10"), (["--format", "yaml"], "--format: invalid choice")]],
    *[(["app", *w], said) for w, said in [([], "arguments are required: RUN"), (["/nowhere"], "There is no run folder at /nowhere"), (["a file ü"], "is a file"), (["run", "--port", "70000"], "--port: '70000' is not a port")]],
    *[(["bench", *w], said) for w, said in [([], "arguments are required: NAME"), (["foo"], "invalid choice: 'foo'"), (["rollout", "--n", "0"], "--n: '0' is not a whole number from 1"), (["bfcl", "--shape", "tiny"], "bench bfcl takes no --shape.")]],
    *[(["trace", *w], said) for w, said in [([], "arguments are required: ACTION"), (["show", "/nowhere"], "There is no run folder at /nowhere"), (["show", "an empty folder"], "is not a run folder"), (["score", "/nowhere", "--model", "x"], "There is no run folder")]],
]


@pytest.mark.parametrize("words,said", BAD, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_bad_input_is_one_sentence(words, said, desk, capfd, monkeypatch):
    try: status = cli.main(words)
    except SystemExit as e: status = e.code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("tirlab: ") and said in lines[0], (status, lines)
    assert not list(desk.glob("runs/*")), "nothing is left behind"


def test_what_is_not_installed_is_named_before_anything_is_loaded(desk, capsys, monkeypatch):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert cli.main(["train", "report_to=wandb"]) == 2
    assert capsys.readouterr().err == "tirlab: report_to=wandb needs wandb, which is not installed: pip install wandb, or report_to=none.\n"


def test_a_port_that_is_taken(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["sandbox", "serve", "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"tirlab: Nobody can listen on 127.0.0.1, port {port} (Address already in use); choose another port, 0 for a free one, or another address.\n"


def test_words_behind_an_option_count(monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train_recipe", lambda settings, resume: seen.append((settings, resume)) or type("T", (), {"run_dir": "x"}))
    for words in (["recipe=gtpo", "--resume", "learning_rate=1e-4", "n=8"], ["--resume", "recipe=gtpo", "learning_rate=1e-4", "n=8"], ["recipe=gtpo", "learning_rate=1e-4", "n=8", "--resume"]):
        assert cli.main(["train", *words]) == 0
    assert seen == [(dict(recipe="gtpo", learning_rate="1e-4", n="8"), True)] * 3


def test_nobody_reads_on():
    "As behind `| head`: no traceback, no message, and not a success either."
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", "import sys; from tirlab.cli.main import main; sys.exit(main())", "doctor"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_interrupted(capsys, monkeypatch):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(training, "train_recipe", interrupted)
    assert cli.main(["train", "recipe=gtpo"]) == 130
    assert capsys.readouterr().err.startswith("tirlab: interrupted; ")


@pytest.mark.parametrize("words", [["--help"], *([c, "--help"] for c in ("demo", "train", "eval", "app", "trace", "recipes", "environments", "demonstrate", "drift-check", "compare", "sandbox", "bench", "doctor"))], ids=" ".join)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as e: cli.main(words)
    assert e.value.code == 0 and capsys.readouterr().out.startswith("usage: tirlab")
