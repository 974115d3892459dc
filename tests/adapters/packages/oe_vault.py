"A vault behind a server of OpenEnv; `python oe_vault.py PORT` serves it."
import sys
from enum import Enum

from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from pydantic import Field


def vault(sessions=16):
    "An app: a vault with a code of two digits, which is opened by turning a dial."
    class Way(str, Enum): left, right = "left", "right"

    class Turn(Action):
        "Turn the dial."
        way: Way
        digit: int = Field(description="Where to stop.", ge=0, le=9)
        note: str | None = None

    class Seen(Observation):
        text: str = ""

    class Vault(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        def reset(self, seed=None, episode_id=None, **options):
            self.code, self.steps = [(seed or 0) % 10, 5], 0
            return Seen(text=f"A vault, number {seed}.")
        def step(self, action, timeout_s=None, **options):
            self.steps += 1
            if action.note == "crash": raise RuntimeError("the dial is stuck")
            if action.digit != self.code[0]: return Seen(text="nothing", reward=-0.1)
            self.code.pop(0)
            if self.code: return Seen(text="click", reward=0.25)
            return Seen(text=f"open {action.way.value}", done=True, reward=1 / self.steps)
        @property
        def state(self): return State(step_count=self.steps)
    return create_fastapi_app(Vault, Turn, Seen, max_concurrent_envs=sessions)


if __name__ == "__main__":
    import uvicorn
    uvicorn.run(vault(), host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
