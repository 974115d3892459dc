"""Environments that answer a turn as a user does: games and simulated users, with tools or without any."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, tiny_policy
from tirlab.rollout.drift import loss_tensors
from tirlab.core.trajectory import StopReason

TOK = AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
SMALL = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, num_generations=4, max_completion_length=96, max_turn_length=16, max_steps=1, learning_rate=1e-3,
             save_strategy="no", disable_tqdm=True, report_to="none")


class Game:
    "Says what it heard three times, then it is over. It has no tools."
    def reset(self, **row): self.heard = []

    def _reply(self, text):
        self.heard.append(text)
        return (f"Move {len(self.heard)}: {text[:4]}", []) if len(self.heard) < 3 else None

    def get_reward(self): return float(len(self.heard))


class Ends(PythonEnvironment):
    "Ends the episode after a call, whatever it returned."
    seen = 0.0
    def _over(self, turns): self.seen = float(len(turns[-1].results)); return True
    def get_reward(self): return self.seen


class Chat(PythonEnvironment):
    "The same, with a tool."
    reset, _reply = Game.reset, Game._reply


SEEN = []


def seen(prompts, completions, completion_ids, **kwargs):
    SEEN.append((completions, [list(i) for i in completion_ids]))
    return [float(len(i) % 5) for i in completion_ids]


def games(*names): return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"Play {i}."}] for i in range(4)], "environment": [names[i % len(names)] for i in range(4)]})


KINDS = {"a game": (Game, games("a")), "a user with a tool": (Chat, games("a")), "some with tools": ({"a": Game, "b": Chat, "c": PythonEnvironment}, games("a", "b", "c"))}


@pytest.mark.parametrize("engine", ["generate", "trl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_is_trained_on(kind, engine, tmp_path):
    "Masks, log-probabilities, messages and rewards are those of the whole conversation, in training and in evaluation."
    factory, rows = KINDS[kind]
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), engine=engine, seed=1, **SMALL)
    trainer, outputs = TIRTrainer(tiny_policy(), [seen], args, rows, rows, environment_factory=factory), []
    inner, tools = trainer._generate_and_score_completions, list(trainer.tools)
    trainer._generate_and_score_completions = lambda inputs: (outputs.append((inner(inputs), trainer.batch.trajectories)), outputs[-1][0])[1]
    SEEN.clear()
    trainer.train()
    trainer.evaluate()
    assert trainer.tools == tools and len(outputs) == len(SEEN) == 5
    replied = 0
    for (output, batch), (completions, ids) in zip(outputs, SEEN):
        want_ids, want_there, want_wrote = loss_tensors(batch, TOK.pad_token_id)
        loss = output["completion_mask"] * output["tool_mask"]
        assert torch.equal(output["completion_ids"], want_ids) and torch.equal(loss, want_there * want_wrote)
        assert completions == [t.messages for t in batch] and ids == [t.completion_ids for t in batch]
        for t, row in zip(batch, loss.tolist()):
            said = [u.reply for u in t.turns if u.reply]
            replied += len(said)
            assert [m["content"] for m in t.messages if m["role"] == "user"] == said and all(r in TOK.decode(t.completion_ids) for r in said)
            assert sum(row) == sum(len(u.ids) for u in t.turns) < len(t.completion_ids) + (not said and len(t.turns) == 1)
            if said and t.stop is StopReason.ANSWER and kind == "a game": assert len(t.turns) == 3
    assert replied > 10


def test_a_games_reward_is_learnt_from(tmp_path):
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), **SMALL | dict(max_steps=2))
    trainer = TIRTrainer(tiny_policy(), [seen], args, games("a"), environment_factory=Game)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/Game/mean" in entry]
    assert len(logged) == 2 and all(entry["rewards/Game/mean"] > 1 for entry in logged)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_an_environment_ends_the_rollout_after_a_call(tmp_path):
    "The results are kept: they are what the reward is about."
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Compute 12+34."}]] * 4})
    trainer = TIRTrainer(tiny_policy(), [seen], TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), **SMALL | dict(max_turn_length=64)), rows, environment_factory=Ends)
    batches, inner = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (batches.append((inner(inputs), trainer.batch.trajectories)), batches[-1][0])[1]
    trainer.train()
    called = [t for _, batch in batches for t in batch if t.results]
    assert called and all(t.stop is StopReason.DONE and len(t.turns) == 1 and t.messages[-1]["role"] == "tool" and t.mask[-1] == 0 for t in called)
