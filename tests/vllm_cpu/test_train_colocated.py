"""
TIRTrainer with vLLM in the same process, on a CPU.

What that takes beside the trainer's own arguments is in conftest.py: settings in the environment, and weights that stay as they are loaded. TRL sets RANK, LOCAL_RANK,
WORLD_SIZE and MASTER_ADDR itself.
"""
import statistics
import time

import pytest

pytestmark = pytest.mark.vllm


def test_reward_rises(vllm, report, tmp_path):
    from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, tiny_policy
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), use_vllm=True, vllm_mode="colocate", vllm_max_model_length=1024, advantage="gtpo",
                     schedule="eager", max_steps=20, per_device_train_batch_size=64, num_generations=8, max_completion_length=192, learning_rate=1e-3,
                     lr_scheduler_type="linear", warmup_steps=2, seed=0, save_strategy="no", disable_tqdm=True)
    trainer = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("arithmetic", "train", 160, 0), environment_factory=PythonEnvironment)
    start = time.perf_counter()
    trainer.train()
    logs = [x for x in trainer.state.log_history if "reward" in x]
    first, last = (statistics.mean(x["reward"] for x in part) for part in (logs[:5], logs[-5:]))
    worst = max(x["sampling/sampling_logp_difference/max"] for x in logs)
    report(f"{len(logs)} GTPO steps with vLLM colocated, {(time.perf_counter() - start) / len(logs):.1f} s each: reward {first:.2f} in the first 5, "
           f"{last:.2f} in the last 5; log-probabilities of sampler and trainer within {worst:.1e}")
    assert len(logs) >= 20 and last > first + 0.2 and worst < 1e-3
