"A game of verifiers whose environment answers as the user, and records rewards of its own; the taskset has no end, and its configuration a split."
import itertools

import verifiers.v1 as vf


class GameConfig(vf.TasksetConfig):
    split: str = "train"
    hard: bool = False


class GameData(vf.TaskData):
    secret: int


class GameTask(vf.Task[GameData]):
    @vf.reward(weight=0.1)
    async def short(self, trace: vf.Trace) -> float: return 1 / 3 / len(trace.assistant_messages)


class Game(vf.Taskset[GameTask, GameConfig]):
    INFINITE = True

    def load(self):
        for i in itertools.count():
            yield GameTask(GameData(prompt=f"{self.config.split}: guess {i}.", secret=100 + i if self.config.hard else i), self.config.task)


class GameEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(max_turns=3)


class GameEnv(vf.Env[GameEnvConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as talk:
            segment, tries = await talk.turn(), 0
            while not segment.terminated:
                tries += 1
                if segment.last_reply == str(task.data.secret): break
                segment = await talk.turn(f"no, try {tries + 1}")
        talk.trace.record_reward("game", 1 / tries if talk.trace.last_reply == str(task.data.secret) else 0.0, 1.0)

    async def finalize(self, task, episode): episode.traces[0].record_metric("users", float(sum(m.role == "user" for m in episode.traces[0].messages)))


__all__ = ["Game", "GameEnv"]
