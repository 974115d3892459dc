"""Training, for one process or several, with a tool that returns a list which cannot be pickled; rewards get that list."""

import threading

from tirlab.all import TIRConfig, TIRTrainer, make_tasks, tiny_policy

LOCK = threading.Lock()


class Locks:
    def reset(self, **row): pass

    def python(self, code: str) -> list:
        """
        Answer.

        Args:
            code: Anything.
        """
        return [LOCK]


def holds_the_lock(completions, **kwargs):
    contents = [[m["content"] for m in c if m["role"] == "tool" and "error" not in m["content"][:10]] for c in completions]
    assert all(x == [LOCK] for c in contents for x in c) and any(contents)
    return [float(len(c)) for c in contents]


def main(folder):
    args = TIRConfig(output_dir=folder, run_dir=folder + "/run", max_steps=1, per_device_train_batch_size=8, num_generations=16, max_completion_length=120, replay_successes=4, oversample=1.0,
                     oversample_rounds=2, min_reward_std=1e-3, log_completions=True, seed=0, save_strategy="steps", save_steps=1, disable_tqdm=True, report_to="none")
    trainer = TIRTrainer(tiny_policy(), holds_the_lock, args, make_tasks("arithmetic", n=4), environment_factory=Locks)
    trainer.train()
    trainer.accelerator.wait_for_everyone()   # gloo aborts a process whose partner has gone first
    trainer.accelerator.end_training()
