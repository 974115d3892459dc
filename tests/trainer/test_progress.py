"""What a training prints: a line a step in a script, TRL's numbers when they are asked for, one process alone; and a figure in a notebook."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, tiny_policy, watch
from tirlab.trainer.live import Live
from tirlab.trainer.progress import Progress, final_checkpoint

SMALL = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=48, max_steps=2, learning_rate=1e-4, save_strategy="no", report_to="none", seed=0, probe="off", trace=False)


def trainer(folder, callbacks=None, **options):
    return TIRTrainer(tiny_policy(), answer_reward, TIRConfig(output_dir=str(folder), **SMALL | options), make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment, callbacks=callbacks)


def test_a_script_prints_a_line_a_step_and_where_everything_is(tmp_path, capsys):
    t = trainer(tmp_path, trace=True, run_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=2, eval_strategy="no")
    t.train()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 2 and all(re.match(rf"step {i}/2  reward +\S+  success +\d+%  entropy +\S+  turns +\S+  tokens +\d+ +\S+ s", line) for i, line in enumerate(steps, 1))
    assert lines[-3:] == [f"Final model: {tmp_path}/checkpoint-2", f"Run folder:  {tmp_path}/run", f"Look at it:  tirlab app {tmp_path}/run"] and len(lines) <= 8
    assert "{'" not in out and "\r" not in err.replace("Loading weights", "").split("it/s]")[-1] and final_checkpoint(t) == f"{tmp_path}/checkpoint-2"


def test_all_numbers_come_when_they_are_asked_for_and_callbacks_of_the_user_stay(tmp_path):
    kinds = lambda t: [type(c) for c in t.callback_handler.callbacks]
    asked, mine = trainer(tmp_path, log_level="info", disable_tqdm=True), trainer(tmp_path, [PrinterCallback()])
    assert PrinterCallback in kinds(asked) and Progress not in kinds(asked)
    assert kinds(mine).count(PrinterCallback) == 1 and ProgressCallback not in kinds(mine) and Progress in kinds(mine)


class Terminal(io.StringIO):
    def isatty(self): return True


@pytest.mark.parametrize("terminal, quiet, bar", [(True, False, True), (True, True, False), (False, False, False)])
def test_a_bar_on_a_terminal_with_the_reward(terminal, quiet, bar, monkeypatch, capsys):
    trainer = SimpleNamespace(step_offset=3, total_steps=5, batches={}, reward_weights=None, gradients=SimpleNamespace(why="1 of 8 rollouts dropped: cut off"))
    state, args = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=True), SimpleNamespace(disable_tqdm=quiet)
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    progress = Progress(trainer)
    progress.on_train_begin(args, state, None)
    state.global_step = 1
    progress.on_step_end(args, state, None), progress.on_log(args, state, None, {"reward": 0.25})
    progress.close()
    assert "step 4/5  reward  0.250" in (out := capsys.readouterr().out) and out.rstrip().endswith("cut off")   # rounds before this one count
    assert ("reward  0.250" in sys.stderr.getvalue()) == bar and ("4/5" in sys.stderr.getvalue()) == bar


def test_other_processes_are_silent(monkeypatch, capsys):
    trainer = SimpleNamespace(step_offset=0, total_steps=None, batches={}, gradients=SimpleNamespace(why=None))
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress, state = Progress(trainer), SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=False)
    progress.on_train_begin(SimpleNamespace(disable_tqdm=False), state, None)
    progress.on_log(None, state, None, {"reward": 0.25})
    assert progress.bar is None and capsys.readouterr().out == "" and sys.stderr.getvalue() == ""


# ---- a figure in a notebook

def test_watch_outside_of_a_notebook_is_refused():
    with pytest.raises(ValueError, match="in a notebook"): watch(None)


def test_one_picture_is_drawn_anew_and_the_last_one_for_sure(tmp_path, monkeypatch):
    drawn, fake = [], SimpleNamespace(update=lambda picture: drawn.append(picture.data))
    t = trainer(tmp_path)
    live = Live(t, {"reward": "Reward", "success": "Success"}, every=3600)
    live.handle = fake
    t.add_callback(live)
    t.train()
    assert len(drawn) == 2 and "step 1 of 2" in drawn[0] and "step 2 of 2" in drawn[1] and [s for s, _ in live.points["success"]] == [1, 2]


NOTEBOOK = ["from tests_of_progress import trainer\nimport tempfile\nt = trainer(tempfile.mkdtemp())", "from tirlab.all import watch\nwatch(t, every=0)\nwatch(t, every=0)", "t.train();"]


@pytest.mark.slow
def test_in_a_real_kernel(tmp_path, monkeypatch):
    "The picture stands in the cell of `watch`, shows the last step at the end, and no line is printed beside it."
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    (tmp_path / "tests_of_progress.py").write_text(open(__file__).read())
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in NOTEBOOK])
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown, printed = book.cells[1].outputs, book.cells[2].outputs
    assert len(shown) == 2 and "step 2 of 2" in shown[1].data["image/svg+xml"] and "waits for the first step" in shown[0].data["image/svg+xml"]   # the cell was run twice: one figure goes on
    assert not any(line.startswith("step ") for o in printed for line in o.get("text", "").splitlines())
