"""The trainer as a user meets it: README lines, GTPO end to end, wrong input in one sentence, interruptions."""

import functools
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import tirlab.recipes.demo
import torch
from forks import ended, forked
from small import small_policy
from transformers import AutoTokenizer, TrainerCallback

from tirlab import all as tirlab_all
from tirlab.algorithms.advantages import discounted_returns, pooled_advantages
from tirlab.core.settings import SettingError
from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, open_run, tiny_policy
from tirlab.cli.main import main
from tirlab.envs.tasks import ENVIRONMENTS
from tirlab.rewards.outcome import format_rewards, turn_rewards
from tirlab.traces.run import RunError

SMALL = dict(per_device_train_batch_size=16, num_generations=8, max_completion_length=160, max_steps=2, learning_rate=1e-4, save_strategy="no", disable_tqdm=True)


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 1


def test_readme_lines_run_with_the_tiny_policy(tmp_path, monkeypatch):
    "The README's Python, changed in two places only: the model and use_vllm."
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", readme, re.S) if "TIRTrainer" in c)
    assert len(code.strip().splitlines()) <= 11
    code, n = re.subn(r'model="[^"]+"', "model=tiny_policy()", code)
    code, m = re.subn("use_vllm=True", "use_vllm=False", code)
    assert n == m == 1
    made, init = [], TIRTrainer.__init__
    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(StopAfter)
        made.append(self)
    monkeypatch.setattr(TIRTrainer, "__init__", remember)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    args, run = made[0].args, open_run(made[0].run_dir)
    assert (args.use_cpu, args.bf16, args.gradient_checkpointing) == (True, False, False) or torch.accelerator.is_available()
    assert next(made[0].model.parameters()).dtype == torch.float32 and run.status() == "finished" and len(run.index()) > 0


def test_what_is_told_wins_over_what_is_picked():
    assert TIRConfig(gradient_checkpointing=True).gradient_checkpointing is True
    assert TIRConfig(bf16=True, use_cpu=True).bf16 is True


def test_gtpo_advantages_reach_the_loss(tmp_path):
    "What the loss sees is recomputed here from the trajectories, and is on record for every token."
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), advantage="gtpo", gamma=0.8, format_penalty=0.3, seed=1, **SMALL | dict(per_device_train_batch_size=8, max_completion_length=96))
    trainer = TIRTrainer(tiny_policy(), [answer_reward], args, make_tasks("all", n=8), environment_factory=ENVIRONMENTS)
    seen, inner = [], trainer._generate_and_score_completions
    def score(inputs):
        out = inner(inputs)
        seen.append((trainer.batch.trajectories, out, answer_reward([t.messages for t in trainer.batch.trajectories], [x["answer"] for x in inputs])))
        return out
    losses, inner_loss = [], trainer._compute_loss
    def loss(model, inputs):
        losses.append(inner_loss(model, inputs).detach())
        mask, advantages = inputs["completion_mask"] * inputs["tool_mask"], inputs["advantages"]      # ratio 1 on the first pass: the loss is minus the mean advantage
        assert losses[-1].item() == pytest.approx(-((advantages * mask).sum() / mask.sum()).item(), abs=1e-5)
        return inner_loss(model, inputs)
    trainer._generate_and_score_completions, trainer._compute_loss = score, loss
    trainer.train()
    assert any(len(t.turns) > 1 for t in seen[0][0])
    plain = [o.clone() for o in losses]
    assert len(plain) == 2
    for batch, out, reward in seen:
        returns = discounted_returns(turn_rewards([format_rewards(t, 0.3) for t in batch], torch.tensor(reward)), 0.8)
        expected = torch.cat([pooled_advantages(g) for g in returns.split(8)])
        for i, t in enumerate(batch):
            want = [expected[i, j].item() if j >= 0 else 0.0 for j in t.turn_of_token]
            assert out["advantages"][i, :len(want)].tolist() == pytest.approx(want, abs=1e-6)
            assert out["advantages"][i, len(want):].eq(0).all() and out["tool_mask"][i, :len(want)].tolist() == t.mask
    run = open_run(args.run_dir)
    rows = [run.trajectory(i) for i in run.index().id]
    recorded = {tuple(r.prompt_ids) + tuple(r.ids): r for r in rows}
    t = next(t for t in seen[0][0] if len(t.turns) > 1)
    row = recorded[tuple(t.prompt_ids + t.completion_ids)]
    model_written = [bool(m) for m in row.mask]
    assert len(row.turn_advantages) == len(t.turns) and (row.advantage[[not m for m in model_written]] == 0).all() and torch.tensor(row.logprob[model_written]).lt(0).all()


def test_same_seed_same_run(tmp_path):
    def go(name):
        args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / name), advantage="gtpo", seed=4, **SMALL | dict(per_device_train_batch_size=8, max_completion_length=96, max_steps=1))
        trainer = TIRTrainer(tiny_policy(), [answer_reward], args, make_tasks("repair", n=8), environment_factory=ENVIRONMENTS)
        trainer.train()
        return [p.detach() for p in trainer.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(go("a"), go("b"), strict=True))


# ---- wrong input: one sentence that says what to do, and nothing left behind


def without_template(folder):
    from transformers import AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(tiny_policy()).save_pretrained(folder)
    return str(folder)


def untyped(code):
    return code


def undocumented(code: str) -> str:
    return code


WRONG = {
    "no chat template": (dict(model="bare"), "chat template"),
    "no answer column": (dict(train_dataset=make_tasks("arithmetic", n=4).remove_columns("answer")), "`answer`"),
    "no prompt column": (dict(train_dataset=make_tasks("arithmetic", n=4).remove_columns("prompt"), environment_factory=None), "`prompt`"),
    "no environment column": (dict(train_dataset=make_tasks("arithmetic", n=4).remove_columns("environment"), environment_factory=ENVIRONMENTS), "`environment`"),
    "budget too small": (dict(max_completion_length=5), "max_completion_length=5"),
    "tool without type hints": (dict(tools=[untyped]), "`code` has no type hint"),
    "tool without a docstring": (dict(tools=[undocumented]), "docstring"),
    "run folder taken": (dict(run_dir="taken"), "not empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_sentence(case, tmp_path):
    change, word = WRONG[case]
    config = SMALL | {k: v for k, v in change.items() if k in ("max_completion_length",)}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    out = tmp_path / "out"
    with pytest.raises((ValueError, RunError), match=re.escape(word)) as caught:
        args = TIRConfig(output_dir=str(out), run_dir=str(tmp_path / change.get("run_dir", "run")), **config)
        model = without_template(tmp_path / "bare") if "model" in change else tiny_policy()
        trainer = TIRTrainer(model, [answer_reward], args, change.get("train_dataset", make_tasks("arithmetic", n=4)), tools=change.get("tools"),
                             environment_factory=change.get("environment_factory", PythonEnvironment))
        trainer.train()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() and not out.exists() and [f.name for f in (tmp_path / "taken").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("option", [dict(loss_type="vespo"), dict(off_policy_mask_threshold=0.5), dict(multi_objective_aggregation="normalize_then_sum"),
                                    dict(gamma=1.5), dict(malformed_calls="ignore"), dict(max_concurrent_tools=0)])
def test_options_without_a_meaning_are_refused_by_name(option):
    with pytest.raises(SettingError) as error: TIRConfig(advantage="gtpo", **option)
    assert {error.value.field: error.value.value} == option


def test_a_second_train_and_odd_columns_keep_all_records(tmp_path):
    "Answers that are numbers, a larger evaluation batch, TRL's own table of completions, and train() twice: nothing is lost."
    tasks = make_tasks("arithmetic", n=8)
    tasks = tasks.remove_columns("answer").add_column("answer", [int(a) for a in tasks["answer"]])
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), advantage="gtpo", per_device_eval_batch_size=32, log_completions=True, **SMALL)
    trainer = TIRTrainer(small_policy(), [answer_reward], args, tasks, {"held out": make_tasks("arithmetic", "test", 4)}, environment_factory=PythonEnvironment)
    trainer.train()
    trainer.evaluate()
    first = open_run(tmp_path / "run").index()
    assert len(first) == 64 and set(first.split) == {"train", "eval"} and first.groupby(["split", "step", "group"]).prompt.nunique().eq(1).all()
    trainer.train()
    assert trainer.run_dir == str(tmp_path / "run-2") and len(open_run(trainer.run_dir).index()) == 32 and len(open_run(tmp_path / "run").index()) == 64


def test_training_goes_on_from_a_checkpoint_into_the_same_folder(tmp_path):
    def trainer(steps):
        args = TIRConfig(output_dir=str(tmp_path / "out"), run_dir=str(tmp_path / "run"), **SMALL | dict(max_steps=steps, save_strategy="steps", save_steps=2))
        return TIRTrainer(small_policy(), [answer_reward], args, make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment)
    trainer(2).train()
    with pytest.raises(RunError, match="already holds a run"):
        trainer(4).train()
    trainer(4).train(resume_from_checkpoint=True)
    index = open_run(tmp_path / "run").index()
    assert sorted(set(index.step)) == [1, 2, 3, 4] and len(index) == 64


def test_a_tool_that_times_out_is_told_and_its_environment_retired(tmp_path):
    class Slow:
        made = []
        def __init__(self):
            Slow.made.append(self)
        def reset(self, **row):
            pass
        def python(self, code: str) -> str:
            """
            Take too long.

            Args:
                code: Anything.
            """
            time.sleep(1)
            return "late"
    args = TIRConfig(output_dir=str(tmp_path), tool_timeout=0.05, run_dir=str(tmp_path / "run"), **SMALL | dict(max_steps=1))
    trainer = TIRTrainer(tiny_policy(), [answer_reward], args, make_tasks("arithmetic", n=8), environment_factory=Slow)
    start = time.perf_counter()
    trainer.train()
    run = open_run(tmp_path / "run")
    late = [i for i in run.index().id if "timed out after 0.05 s" in "".join(run.trajectory(i).text)]
    assert late and len(Slow.made) >= 16 + len(late) and time.perf_counter() - start < 60


@pytest.mark.parametrize("argv", [["app", "/nowhere"], ["demo", "--steps", "0"], ["demo", "--out", "."]])
def test_commands_answer_wrong_input_with_one_line(argv, capsys, monkeypatch, tmp_path):
    (tmp_path / "something.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    try: code = main(argv)
    except SystemExit as e: code = e.code   # what argparse refuses
    assert code == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert [line for line in err if line.startswith("tirlab")] == err[-1:] and "Traceback" not in "\n".join(err)
    assert [f.name for f in tmp_path.iterdir()] == ["something.txt"]


def long_demo(run):
    "The demo in many steps; success is measured on few tasks."
    tirlab.recipes.demo.demo = functools.partial(tirlab.recipes.demo.demo, held_out=8)
    return main(["demo", "--steps", "200", "--out", run])


def test_interrupting_the_demo_leaves_a_run_that_opens(tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    process, end = forked(long_demo, str(run), said=said), time.monotonic() + 120
    while time.monotonic() < end and process.is_alive() and not (run / "index.jsonl").exists(): time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert ended(process, 60) == 130, said.read_text()
    assert "Traceback" not in said.read_text() and said.read_text().strip().splitlines()[-1].startswith("tirlab: ")
    opened = open_run(run)
    assert opened.status() == "interrupted" and len(opened.index()) >= 64
    assert len(opened.trajectory(opened.index().id.iloc[0]).ids) > 0


@pytest.mark.slow
def test_demo_prints_figures_of_its_own_run_and_repeats_them(tmp_path):
    def go(name):
        said = tmp_path / f"{name}.said"
        assert ended(forked(main, ["demo", "--steps", "1", "--seed", "7", "--out", str(tmp_path / name), "--json"], said=said)) == 0, said.read_text()
        return json.loads(said.read_text().strip().splitlines()[-1])
    first, second = go("a"), go("b")
    assert set(first) == {"success_before", "success_after", "seconds", "rollouts_per_second", "run_dir"}
    assert [first[k] for k in ("success_before", "success_after")] == [second[k] for k in ("success_before", "success_after")]
    rewards = [open_run(r["run_dir"]).index().reward.tolist() for r in (first, second)]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 64 and open_run(first["run_dir"]).status() == "finished"


def test_all_is_short_and_gives_what_a_user_begins_with():
    names = tirlab_all.__all__
    assert {"TIRTrainer", "TIRConfig", "PythonEnvironment", "answer_reward", "make_tasks", "tiny_policy", "open_run", "evaluate", "rollouts"} <= set(names)
    assert len(names) == len(set(names)) <= 70 and all(hasattr(tirlab_all, name) for name in names)
    assert {n for n in vars(tirlab_all) if not n.startswith("_")} == set(names)
