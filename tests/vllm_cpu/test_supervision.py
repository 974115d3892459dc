"""
Supervision with vLLM in the same process: rows that the policy did not sample from their prompt have no sampler, so vLLM's importance correction leaves them alone.
"""
import pytest
import torch

pytestmark = pytest.mark.vllm


def test_only_sampled_rows_are_corrected(vllm, report, tmp_path):
    "The policy moves between vLLM and the loss, so that every ratio that is computed shows; those of shown, told and remembered rows are 1, exactly."
    from tirlab.all import Hints, OffPolicy, Replay, TIRConfig, TIRTrainer, answer_reward, make_tasks, tiny_policy
    from tirlab.envs.tasks import ENVIRONMENTS
    group, tasks, failing = 6, make_tasks("all", n=3), []
    def reward(completions, answer, **kwargs): return [0.0] * len(completions) if failing else answer_reward(completions, answer, **kwargs)
    args = TIRConfig(output_dir=str(tmp_path), use_vllm=True, vllm_mode="colocate", vllm_max_model_length=1024, vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="token_truncate",
                     per_device_train_batch_size=3 * group, num_generations=group, max_completion_length=192, max_steps=1, seed=0, save_strategy="no", disable_tqdm=True, report_to="none", trace=False, sync_tolerance=9.0)
    trainer = TIRTrainer(tiny_policy(), reward, args, tasks, environment_factory=ENVIRONMENTS, supervision=[OffPolicy(1), Hints(1), Replay(threshold=0.0)])
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    def batch(): return trainer._generate_and_score_completions([tasks[i] for i in range(3) for _ in range(group)])
    scored = trainer._get_per_token_logps_and_entropies
    def elsewhere(model, *given, **named):
        "As the loss sees it, the policy is a little sharper than vLLM's."
        logp, *rest = scored(model, *given, **named)
        return 1.1 * logp, *rest
    trainer._get_per_token_logps_and_entropies = elsewhere
    first = batch()
    seen = [t.origin for t in trainer.batch.trajectories]
    assert seen == ["demonstration", "hinted", *["sampled"] * (group - 2)] * 3
    check(trainer, first)
    failing.append(True)   # all fail now: successes that were kept take the places of first rollouts
    trainer.state.global_step += 1
    second = batch()
    origins = [t.origin for t in trainer.batch.trajectories]
    assert "replay" in origins and "hinted" in origins and "sampled" in origins
    left = check(trainer, second)
    report(f"Importance correction of vLLM: exactly 1 on {', '.join(f'{origins.count(o)} {o}' for o in dict.fromkeys(origins) if o != 'sampled')} rows, {left:.3f} on average on sampled ones")


def check(trainer, out):
    "Ratios by row: 1 without a sampler, the sampler's elsewhere; the mean of the latter."
    ratio, wrote = out["importance_sampling_ratio"], (out["completion_mask"] * out["tool_mask"]).bool()
    sampler, ours = out["sampling_per_token_logps"], out["old_per_token_logps"]
    assert ratio.shape == wrote.shape
    for i, t in enumerate(trainer.batch.trajectories):
        if t.origin == "sampled":
            wanted = (ours[i] - torch.nn.functional.pad(torch.tensor(t.logprobs), (0, len(wrote[i]) - len(t.logprobs)))).exp().clamp(max=trainer.vllm_importance_sampling_clip_max)
            assert torch.allclose(ratio[i][wrote[i]], wanted[wrote[i]]) and not sampler[i][wrote[i]].isnan().any() and (ratio[i][wrote[i]] != 1).any()
        else: assert (ratio[i] == 1).all() and sampler[i][wrote[i]].isnan().all(), t.origin
    mine = torch.tensor([t.origin == "sampled" for t in trainer.batch.trajectories])
    return ratio[mine][wrote[mine]].mean().item()
