"""One step of training, for one process or several: `python two_processes.py FOLDER` or `torchrun --nproc-per-node 2 two_processes.py FOLDER`."""

import os
import sys

from tirlab.all import AuxiliarySFT, Hints, OffPolicy, TIRConfig, TIRTrainer, answer_reward, make_tasks, tiny_policy
from tirlab.envs.tasks import ENVIRONMENTS

def main(folder):
    n = 8 // int(os.environ.get("WORLD_SIZE", 1))
    args = TIRConfig(output_dir=folder, run_dir=folder + "/run", advantage="gtpo", void_filter="trajectory", max_steps=1, per_device_train_batch_size=n, num_generations=8,
                     max_completion_length=64, prompt_sampling="mopps", replay_successes=4, oversample=1.0, oversample_rounds=2, min_reward_std=1e-3,
                     seed=0, save_strategy="no", disable_tqdm=True, report_to="none")
    trainer = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("all", n=4), environment_factory=ENVIRONMENTS,
                         supervision=[OffPolicy(1), Hints(2), AuxiliarySFT(0.1)])
    trainer.train()
    trainer.accelerator.wait_for_everyone()   # gloo aborts a process whose partner has gone first
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
