"""One step of training with an estimator of the user's, for one process or several; what it is told is written to FOLDER-RANK.json."""

import json
import os

from tirlab.all import TIRConfig, TIRTrainer, answer_reward, make_tasks, tiny_policy
from tirlab.envs.environments import PythonEnvironment


class Anyhow:
    "Chooses other rows in each process: the first one decides."
    def __init__(self, dataset, args): self.rank = int(os.environ.get("RANK", 0))
    def choose(self, count): return [(i + 1 + self.rank) % 3 for i in range(count)]


def main(folder):
    told, rank = {}, int(os.environ.get("RANK", 0))
    def mine(rewards, group_size, *, batch):
        told.update(texts=[t.completion_ids for t in batch.trajectories], answers=[r["answer"] for r in batch.rows], outcomes=batch.outcomes.tolist(),
                    turns=[len(t.turns) for t in batch.trajectories], logps=[[x for x in row.tolist() if x == x] for row in batch.logps])
        return rewards - rewards.nanmean()
    n = 16 // int(os.environ.get("WORLD_SIZE", 1))
    args = TIRConfig(output_dir=folder, advantage=mine, prompt_sampling=Anyhow, max_steps=1, per_device_train_batch_size=n, num_generations=8, max_completion_length=100, seed=0, trace=False,
                     save_strategy="no", disable_tqdm=True, report_to="none")
    trainer = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("arithmetic", n=3), environment_factory=PythonEnvironment)
    trainer.train()
    with open(f"{folder}-{rank}.json", "w") as f: json.dump(told, f)
    trainer.accelerator.wait_for_everyone()   # gloo aborts a process whose partner has gone first
    trainer.accelerator.end_training()


if __name__ == "__main__":
    import sys
    main(*sys.argv[1:])
