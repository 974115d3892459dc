"A taskset of verifiers with a tool that keeps a state, weights, a metric and a stop."
from collections.abc import Iterable

import verifiers.v1 as vf


class Ledger(vf.State):
    total: int = 0


class Till(vf.Toolset[vf.ToolsetConfig, Ledger]):
    TOOL_PREFIX = None

    async def setup_task(self, task): self.most = task.most

    @vf.tool
    def charge(self, amount: int, note: str = "") -> str:
        "Charge an amount in cents."
        self.state.total += amount
        if amount < 0: raise ValueError("no refunds")
        return f"{self.state.total} of {self.most} {note}".strip()


class SaleData(vf.TaskData):
    answer: int
    most: int
    info: dict


class Sale(vf.Task[SaleData, Ledger]):
    @classmethod
    def toolsets(cls, config): return [Till(vf.ToolsetConfig())]

    @vf.stop
    async def too_much(self, trace: vf.Trace) -> bool: return trace.state.total > self.data.most

    @vf.reward(weight=0.3)
    async def charged(self, trace: vf.Trace) -> float: return trace.state.total / self.data.answer

    @vf.reward(weight=-0.7)
    async def said(self, trace: vf.Trace) -> float: return float(str(self.data.answer) in trace.last_reply)

    @vf.metric
    async def turns(self, trace: vf.Trace) -> float: return trace.num_turns


class Sales(vf.Taskset[Sale, vf.TasksetConfig]):
    def load(self) -> Iterable[Sale]:
        for a, b in ((3, 4), (10, 5), (7, 7), (50, 60)):
            yield Sale(SaleData(name=f"sale {a}", prompt=f"Charge {a}, then {b} cents.", system_prompt="You sell.", answer=a + b, most=40, info={"parts": [a, {"b": b}]}), self.config.task)


__all__ = ["Sales"]
if __name__ == "__main__": Till.run()
