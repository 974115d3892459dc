"""Training that goes on from a checkpoint ends with the weights of a run that was never stopped, or says in one sentence why it cannot; and a run folder holds one history."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from small import halves, small_policy

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, make_tasks, open_run
from tirlab.trainer.checkpoints import inside_batch
from tirlab.trainer.phases import last_checkpoint
from tirlab.recipes.training import train_recipe
from tirlab.trainer.recording import rewind
from tirlab.traces.run import RunWriter

SMALL = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=48, max_steps=4, learning_rate=1e-3, save_strategy="steps", save_steps=1, disable_tqdm=True, report_to="none", seed=0,
             probe="off")
BATCHES = {"iterations": dict(num_iterations=2), "parts": dict(steps_per_generation=2), "both": dict(num_iterations=2, steps_per_generation=2), "both, accumulated": dict(num_iterations=2, steps_per_generation=2, gradient_accumulation_steps=2),
           "parts of three": dict(steps_per_generation=3, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=6), "one step": dict(gradient_accumulation_steps=2, steps_per_generation=1)}
WHOLE = {"iterations": 2, "parts": 2, "both": 4, "both, accumulated": 2, "parts of three": 3, "one step": 1}   # steps after which a batch is over


def made(folder, n=64, **options):
    args = TIRConfig(output_dir=str(folder / "out"), run_dir=str(folder / "run"), **SMALL | options)
    return TIRTrainer(small_policy(), halves, args, make_tasks("arithmetic", n=n), environment_factory=PythonEnvironment)


def weights(t): return torch.cat([p.detach().flatten() for p in t.model.parameters()])


def history(run):
    "What a run folder says: rollouts by step, and metrics by step, without what differs with the time of day."
    index, metrics = open_run(run).index(), open_run(run).metrics()
    return sorted(zip(index.id, index.step, index.reward, index.tokens)), metrics[["step", "reward", "loss", "entropy"]].dropna().to_dict("records")


@pytest.mark.parametrize("name", ["iterations", "parts", "one step", *(pytest.param(n, marks=pytest.mark.slow) for n in ("both", "both, accumulated", "parts of three"))])
def test_it_ends_alike_from_between_batches_and_is_refused_inside_of_one(name, tmp_path):
    options, every = BATCHES[name], WHOLE[name]
    steps = options.get("max_steps", 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        through = made(tmp_path, **options)
        through.train()
    assert any(f"set save_steps to a multiple of {every}, such as {every}." in str(w.message) for w in said) == (every > 1)
    again = made(tmp_path, **options)
    for step in range(1, steps):
        checkpoint = str(tmp_path / f"out/checkpoint-{step}")
        if step % every:
            before = history(tmp_path / "run")
            with pytest.raises(ValueError, match=f"checkpoint-{step} lies inside a batch.*Resume from a checkpoint at a multiple of {every}, and set save_steps to a multiple of {every}"): again.train(resume_from_checkpoint=checkpoint)
            assert history(tmp_path / "run") == before
        elif step == every:   # others were overwritten by the same
            expected = history(tmp_path / "run")
            again.train(resume_from_checkpoint=checkpoint)
            assert torch.equal(weights(through), weights(again)) and history(tmp_path / "run") == expected


def test_true_takes_the_newest_checkpoint_between_batches(tmp_path):
    through = made(tmp_path, num_iterations=2)
    through.train()
    expected = weights(through)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    again = made(tmp_path, num_iterations=2)
    assert last_checkpoint(tmp_path / "out", again).endswith("checkpoint-2") and last_checkpoint(tmp_path / "out").endswith("checkpoint-3")
    with pytest.warns(UserWarning, match="checkpoint-3 lies inside a batch .* so training goes on from .*checkpoint-2"): again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), expected)
    for step in (2, 4): shutil.rmtree(tmp_path / f"out/checkpoint-{step}")
    with pytest.raises(ValueError, match="lies inside a batch"): made(tmp_path, num_iterations=2).train(resume_from_checkpoint=True)


def test_the_last_batch_of_an_epoch_may_be_short(tmp_path):
    "Three batches of one step and a half an epoch: the fifth step begins the second epoch."
    t = made(tmp_path, n=3, steps_per_generation=3, per_device_train_batch_size=4, num_generations=12, gradient_accumulation_steps=2)
    assert [inside_batch(t, s) for s in range(11)] == [False, True, True, False, True, False, True, True, False, True, False]


def test_a_second_training_of_the_same_trainer_begins_with_a_batch_of_its_own(tmp_path):
    t = made(tmp_path, num_iterations=2, max_steps=3, save_strategy="no")
    t.train()
    t.train()
    assert open_run(t.run_dir).index().step.tolist() == [1] * 4 + [3] * 4


@pytest.mark.parametrize("where", ["the same trainer", "another"])
def test_steps_after_the_checkpoint_are_cut_off_the_record(where, tmp_path):
    "Recorded up to step 4; gone on with from step 2, to step 3: nothing of the old third and fourth step is left."
    t = made(tmp_path, seed=0)
    t.train()
    (Path(t.run_dir) / "alarms.jsonl").write_text("".join(json.dumps({"step": s, "signal": "reward", "value": 0}) + "\n" for s in (1, 4)))
    old, run = history(t.run_dir), open_run(t.run_dir)
    assert run.index().step.max() == 4
    if where == "another": t = made(tmp_path, max_steps=3, learning_rate=1e-2)
    else: t.args.max_steps = 3
    t.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    new, meta = history(t.run_dir), open_run(t.run_dir).meta()
    assert [r for r in new[0] if r[1] < 3] == [r for r in old[0] if r[1] < 3] and {r[1] for r in new[0]} == {1, 2, 3} and [m["step"] for m in new[1]] == [1, 2, 3]
    assert sorted(p.name for p in (tmp_path / "run/tokens").iterdir()) == [f"step-00000{i}.rank-0.parquet" for i in (1, 2, 3)] and meta["step"] == 3
    assert [json.loads(line)["step"] for line in (tmp_path / "run/alarms.jsonl").read_text().splitlines()] == [1]
    assert open_run(t.run_dir).steps().step.tolist() == [1, 2, 3] and all(open_run(t.run_dir).trajectory(i) for i in open_run(t.run_dir).index().id)
    assert run.index().step.max() == 3 and len(run.metrics()) >= 3   # a reader that was open sees it too


def test_a_checkpoint_that_cannot_be_read_costs_nothing(tmp_path):
    t = made(tmp_path, max_steps=2)
    t.train()
    before = history(t.run_dir)
    (tmp_path / "out/checkpoint-1/model.safetensors").write_bytes(b"torn")
    with pytest.raises(Exception): made(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))  # noqa: B017
    assert history(t.run_dir) == before


def test_lines_that_are_not_ours_stay(tmp_path):
    writer = RunWriter(tmp_path / "run", {})
    for step in (1, 2, 3): writer.log(step, {"reward": 1.0})
    file = tmp_path / "run/metrics.jsonl"
    file.write_text("not ours\n" + file.read_text())
    rewind(writer, 1)
    assert [line[:8] for line in file.read_text().splitlines()][0] == "not ours" and len(file.read_text().splitlines()) == 2


def test_the_command_line_goes_on_from_between_batches(tmp_path):
    "A checkpoint after every step, two steps a batch: --resume takes the one before, and ends alike."
    def given(name, steps):
        return dict(recipe="dr_grpo", tasks="arithmetic", max_steps=str(steps), num_iterations="2", save_steps="1", output_dir=str(tmp_path / name), n="64", level="1", per_device_train_batch_size="8",
                                        num_generations="8", max_completion_length="72")
    through = train_recipe(given("through", 4))
    shutil.copytree(tmp_path / "through", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-4")
    again = train_recipe(given("cut", 4), resume=True)
    assert (open_run(through.run_dir).metrics().skipped_steps == 0).any() and torch.equal(weights(through), weights(again)) and Path(again.run_dir).parent == tmp_path / "cut"
    assert history(again.run_dir) == history(through.run_dir)
