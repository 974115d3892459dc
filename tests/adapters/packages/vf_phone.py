"A user of verifiers who speaks first; rewards that are awaited, keyed, and plugged in."
import asyncio

import verifiers.v1 as vf


class PhoneConfig(vf.TaskConfig):
    fee: float = 0.25


class PhoneTask(vf.Task[vf.TaskData, vf.State, PhoneConfig]):
    @vf.reward(weight=0.6, priority=2)
    async def awaited(self, trace: vf.Trace) -> float:
        await asyncio.sleep(0.01)
        return 0.1 + 0.2

    @vf.reward(weight=0.7)
    async def keyed(self, task, trace: vf.Trace) -> dict: return {"fee": self.config.fee, "words": len(trace.last_reply.split()) / 7}

    @vf.metric
    async def parts(self, trace: vf.Trace) -> dict: return {"assistant": len(trace.assistant_messages), "all": len(trace.messages)}


async def plugged(trace) -> float: return 1 / 9


class PhonesConfig(vf.TasksetConfig):
    task: PhoneConfig = PhoneConfig()


class Phone(vf.Taskset[PhoneTask, PhonesConfig]):
    def load(self):
        for name in ("Ada", "Bo"): yield PhoneTask(vf.TaskData(name=name, prompt=f"You are {name}.", system_prompt="Be brief."), self.config.task)


class PhoneEnvConfig(vf.EnvConfig):
    clerk: vf.AgentConfig = vf.AgentConfig()


class PhoneEnv(vf.Env[PhoneEnvConfig]):
    async def run(self, task, agents):
        masked = type(task)(task.data.model_copy(update={"prompt": None}), task.config)
        async with agents.clerk.interaction(masked) as talk:
            answer = await talk.turn(f"Hello, {task.data.name} here.")
            if not answer.terminated: await talk.turn([{"role": "user", "content": f"You said: {answer.last_reply}"}])


__all__ = ["Phone", "PhoneEnv"]
