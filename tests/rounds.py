"""An interleaved run that may be killed: `python rounds.py FOLDER [WHERE]`, WHERE one of start, rl, rl-end, sft, sft-end, between; without it, to the end, going on with what is there."""

import os
import signal
import sys
import zlib
from pathlib import Path

from small import small_policy
from transformers import TrainerCallback

import tirlab.trainer.interleave
from tirlab.all import ErroneousTrajectories, Interleave, TIRConfig, TIRTrainer, make_tasks
from tirlab.envs.tasks import ENVIRONMENTS


class Kill(TrainerCallback):
    "SIGKILL right after the checkpoint of a step, the last one if it is None."
    def __init__(self, name, step):
        self.name, self.step = name, step

    def on_save(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == self.name and state.global_step == (self.step or state.max_steps):
            os.kill(os.getpid(), signal.SIGKILL)


def reward(completion_ids, **kwargs):
    "About every second rollout succeeds, as its tokens say."
    return [float(zlib.crc32(repr(list(map(int, ids))).encode()) % 2) for ids in completion_ids]


def main(folder, where=None):
    args = TIRConfig(output_dir=folder, run_dir=folder + "/run", per_device_train_batch_size=8, num_generations=4, max_completion_length=120, learning_rate=1e-3, beta=0.05, seed=3, advantage="gtpo",
                     save_strategy="steps", save_steps=1, disable_tqdm=True, report_to="none", prompt_sampling="mopps", probe="off")
    trainer = TIRTrainer(small_policy(), reward, args, make_tasks("all", n=12), environment_factory=ENVIRONMENTS)
    places = {"start": ("phase-00-rl", 1), "rl": ("phase-02-rl", 1), "rl-end": ("phase-02-rl", None), "sft": ("phase-03-sft", 2), "sft-end": ("phase-01-sft", None)}
    if where in ("start", "rl", "rl-end"): trainer.add_callback(Kill(*places[where]))
    if where in ("sft", "sft-end"):
        made = tirlab.trainer.interleave.SFTTrainer
        tirlab.trainer.interleave.SFTTrainer = lambda callbacks=None, **kwargs: made(callbacks=[*(callbacks or []), Kill(*places[where])], **kwargs)
    if where == "between":
        stored = tirlab.trainer.interleave.store_phase
        def store(trainer, folder, optimizer):
            stored(trainer, folder, optimizer)
            if folder.name == "phase-01-sft": os.kill(os.getpid(), signal.SIGKILL)
        tirlab.trainer.interleave.store_phase = store
    plan = Interleave([1, 2, 1], [ErroneousTrajectories("any")], sft=dict(learning_rate=1e-3, per_device_train_batch_size=2))
    plan.train(trainer, resume=True)
    trainer.accelerator.wait_for_everyone()   # gloo aborts a process whose partner has gone first
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
