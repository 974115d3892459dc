"""What only the loss knows: rollouts dropped for the ratio of the policy to the one before the step, and draws that differ in every part of a step."""

import pytest
import torch
from small import halves, small_policy

import tirlab.trainer.objective
from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, make_tasks, open_run

SMALL = dict(per_device_train_batch_size=8, num_generations=8, max_completion_length=64, max_steps=2, learning_rate=2e-3, lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
             report_to="none", seed=0)
SEVERAL = {"iterations": dict(num_iterations=2), "parts": dict(steps_per_generation=2, per_device_train_batch_size=4, num_generations=4),
           "parts and iterations": dict(num_iterations=2, steps_per_generation=2, per_device_train_batch_size=4, num_generations=4, max_steps=4),
           "accumulation": dict(num_iterations=2, gradient_accumulation_steps=2, per_device_train_batch_size=4, num_generations=4)}


def trained(folder, monkeypatch=None, **options):
    "A run on the CPU, and the ratios that its losses saw: step, number of the row, largest ratio, whether it was dropped."
    seen, ours = [], tirlab.trainer.objective.drop_high_ratios
    t = TIRTrainer(small_policy(), halves, TIRConfig(output_dir=str(folder), run_dir=str(folder / "run"), **SMALL | options), make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment)
    def listen(trainer, inputs, logp, mask):
        (changed, kept), old = ours(trainer, inputs, logp, mask), inputs.get("old_per_token_logps")
        largest = torch.ones(len(logp)) if old is None else ((logp.detach() - old).exp() * mask).amax(1)
        seen.extend((t.state.global_step + 1, i, r, bool(changed) and not k.any()) for i, r, k in zip(inputs["record"].tolist(), largest.tolist(), kept))
        return changed, kept
    if monkeypatch: monkeypatch.setattr(tirlab.trainer.objective, "drop_high_ratios", listen)
    t.train()
    return t, seen


def weights(t): return torch.cat([p.detach().flatten() for p in t.model.parameters()])


@pytest.mark.parametrize("several", SEVERAL.values(), ids=SEVERAL)
def test_rollouts_that_moved_too_far_are_dropped_and_the_record_says_why(several, tmp_path, monkeypatch):
    t, seen = trained(tmp_path, monkeypatch, void_filter="high_ratio", filter_threshold=1.1, **several)
    assert all(r == pytest.approx(1, abs=1e-4) and not d for step, _, r, d in seen if step == 1)      # the batch is new: nothing has moved
    assert all(d == (r > 1.1) for *_, r, d in seen) and {d for *_, d in seen} == {True, False}
    index, lost = open_run(t.run_dir).index(), {i for _, i, _, d in seen if d}
    assert len(index) == len({i for _, i, *_ in seen}) and set(index.index[index.dropped.notna()]) == lost
    assert index.dropped.dropna().str.fullmatch(r"\d+ tokens? with ratio above 1.1").all()
    shares = [m["filter/high_ratio_rollouts"] for m in t.state.log_history if "filter/high_ratio_rollouts" in m]
    assert shares == pytest.approx([sum(d for s, *_, d in seen if s == step) / sum(s == step for s, *_ in seen) for step in range(1, t.state.global_step + 1)])


def test_a_ratio_that_nothing_reaches_changes_nothing_and_one_that_all_reach_stops_the_step(tmp_path):
    plain, _ = trained(tmp_path / "a", num_iterations=2)
    far, _ = trained(tmp_path / "b", num_iterations=2, void_filter="high_ratio", filter_threshold=1e6)
    near, _ = trained(tmp_path / "c", num_iterations=2, void_filter="high_ratio", filter_threshold=1e-6)
    one, _ = trained(tmp_path / "d", num_iterations=2, max_steps=1)
    assert torch.equal(weights(plain), weights(far)) and open_run(far.run_dir).index().dropped.isna().all()
    first, second = (m["skipped_steps"] for m in near.state.log_history if "skipped_steps" in m)
    assert (first, second) == (1.0, 1.0) and not torch.equal(weights(one), weights(near)) and not torch.equal(weights(plain), weights(one))


def test_every_part_of_a_step_has_its_own_draw(tmp_path, monkeypatch):
    draws, ours = [], tirlab.trainer.objective.kept_advantages
    def listen(args, logp, inputs, mask, draw):
        draws.append(draw)
        return ours(args, logp, inputs, mask, draw)
    monkeypatch.setattr(tirlab.trainer.objective, "kept_advantages", listen)
    trained(tmp_path, clip_cov_ratio=0.01, gradient_accumulation_steps=2, per_device_train_batch_size=4, num_generations=4, trace=False)
    assert draws == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
