"""Environments of verifiers: what a rollout of ours reads and earns is what verifiers' own rollout reads and earns, and the other way round."""

import asyncio
import sys
from pathlib import Path

import pytest
from asking_shop import Shop
from datasets import Dataset
from scripted_endpoint import call, scripted

from tirlab.core.trajectory import StopReason
from tirlab.eval.evaluate import evaluate
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.endpoint import Endpoint

pytestmark = pytest.mark.adapter
PACKAGES = str(Path(__file__).parent / "packages")


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    "Packages of verifiers, for this process and for the tool servers that verifiers starts."
    monkeypatch.syspath_prepend(PACKAGES)
    monkeypatch.setenv("PYTHONPATH", PACKAGES)
    for name in ("NO_PROXY", "no_proxy"): monkeypatch.setenv(name, "127.0.0.1,localhost")


def there(env, url):
    "Roll every task out with verifiers' own machinery; return the traces."
    import verifiers.v1 as vf
    context = vf.ModelContext(model="m", client=vf.EvalClientConfig(base_url=url, api_key_var="NO_SUCH_KEY"))
    async def go(tasks):
        async with env.serving(): return [await env.run_episode(t, context) for t in tasks]
    episodes = asyncio.run(go(list(env.taskset.take(4))))
    assert not [e for episode in episodes for e in [*episode.errors, *(x for t in episode.traces for x in t.errors)]]
    return [episode.traces[0] for episode in episodes]


def reference(name, url, seat="agent", **taskset):
    "Load an environment for verifiers' own machinery, with its chat program in this process."
    import verifiers.v1 as vf
    return there(vf.load_environment(vf.resolve_env_config({"taskset": {"id": name, **taskset}, seat: {"harness": {"id": "vf_harness"}, "runtime": {"type": "subprocess"}}})), url)


def here(tasks, url, **options):
    "Roll every row out with tirlab."
    return evaluate(None, None, tasks.rows, tasks.environment, tasks.rewards, engine=Endpoint(url, "m", None, pause=0.01), limits=RolloutLimits(completion_tokens=2**20, observation_chars=None), **options)


def plain(messages):
    "Messages as (role, text, calls), without ids."
    text = lambda m: m.get("content") or ""
    names = lambda m: [(f["name"], f["arguments"]) for c in m.get("tool_calls") or [] for f in [c.get("function", c)]]
    import json
    read = lambda a: json.loads(a) if isinstance(a, str) else a
    return [(m["role"], text(m), [(n, read(a)) for n, a in names(m)]) for m in messages]


def last_user(messages): return next(m["content"] for m in messages if m["role"] == "user")


SALES = {"Charge 3": [[call("charge", amount=3)], [call("charge", amount=4, note="thanks")], "It is 7."],                  # as it should be
         "Charge 10": [[call("charge", amount=10), call("charge", amount=5)], "Done."],                                    # two calls in a turn, a wrong answer
         "Charge 7": [[call("charge", amount=-1)], [call("charge", amount="x")], [call("refund")], [call("charge", amount=7)], "14"],   # calls that fail
         "Charge 50": [[call("charge", amount=50)], [call("charge", amount=60)], "never"]}                                 # a stop


def test_tools_states_stops_and_weighted_rewards_are_those_of_verifiers():
    from tirlab.adapters.verifiers import tasks
    found = tasks("vf_sales")
    assert found.rows.column_names == ["prompt", "task", "data", "name", "answer", "most"] and '"parts":[7,{"b":7}]' in found.rows[2]["data"]
    assert found.rows[0]["prompt"] == [{"role": "system", "content": "You sell."}, {"role": "user", "content": "Charge 3, then 4 cents."}]
    seen = []
    with scripted(lambda m: next(v for k, v in SALES.items() if last_user(m).startswith(k + ",")), seen) as url:
        traces = reference("vf_sales", url)
        asked, ours = [b["tools"] for b in seen], here(found, url)
    assert [b["tools"] for b in seen[len(asked):]] == asked[:len(seen) - len(asked)] and asked[0][0]["function"]["name"] == "charge"
    for trajectory, trace, reward in zip(ours.trajectories, traces, ours.by_function["vf_sales"]):
        theirs = [m.model_dump() for m in trace.messages if m.role != "system"][1:]
        mine = trajectory.messages
        if trajectory.stop is StopReason.DONE: mine = mine[:len(theirs)]   # the last results were never sent to a model there
        unknown = lambda m: m[0] == "tool" and "refund" in m[1]
        assert [m for m in plain(mine) if not unknown(m)] == [m for m in plain(theirs) if not unknown(m)]
        assert reward == pytest.approx(trace.reward, rel=1e-6)
    assert [t.stop for t in ours.trajectories] == [StopReason.ANSWER] * 3 + [StopReason.DONE] and traces[3].stop_condition == "too_much"
    assert ours.extra["turns"] == [t.metrics["turns"] for t in traces] and ours.extra["charged"] == [t.rewards["charged"].score for t in traces]


def compare(ours, traces, name):
    "Whether messages and rewards are those of verifiers; rewards are float32 in an evaluation."
    for trajectory, trace, reward in zip(ours.trajectories, traces, ours.by_function[name]):
        mine, theirs = trajectory.messages, [m.model_dump() for m in trace.messages]
        assert plain(mine)[:len(theirs)] == plain(theirs)[-len(mine):] and reward == pytest.approx(trace.reward, rel=1e-6)
    for part in {k for t in traces for k in (*t.rewards, *t.metrics)}:
        assert ours.extra[part] == [t.rewards[part].score if part in t.rewards else t.metrics[part] for t in traces], part


def test_a_game_that_answers_as_the_user():
    from tirlab.adapters.verifiers import tasks
    found = tasks("vf_game", "train", 4)
    scripts = {0: ["5", "0"], 1: ["1"], 2: ["7", "8", "9", "2"], 3: ["1", "2", "3"]}
    with scripted(lambda m: scripts[int(last_user(m).split()[-1].rstrip("."))]) as url:
        traces = reference("vf_game", url, "player")
        ours = here(found, url)
    compare(ours, traces, "vf_game")
    assert [len(t.turns) for t in ours.trajectories] == [2, 1, 3, 3] and [t.stop_condition for t in traces][2:] == ["max_turns", "user_closed"] and ours.extra["game"] == [0.5, 1.0, 0.0, 1 / 3]


def test_a_user_who_speaks_first_and_rewards_of_every_kind(tmp_path):
    from tirlab.adapters.verifiers import tasks
    options = dict(task={"rewards": {"ninth": {"fn": "vf_phone:plugged", "weight": 0.9}}, "fee": 0.125})
    found = tasks("vf_phone", **options)
    assert found.rows[0]["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}]
    with scripted(lambda m: ["Hi there.", "So I did, Ada" if "Ada" in last_user(m) else "Did I?"]) as url:
        traces = reference("vf_phone", url, "clerk", **options)
        ours = here(found, url)
    compare(ours, traces, "vf_phone")
    assert set(traces[0].rewards) == {"awaited", "fee", "words", "ninth"} and plain(ours.trajectories[0].messages)[1] == ("user", "You said: Hi there.", [])


def test_the_reward_function_returns_the_float_of_verifiers():
    "No rounding, whatever the weights."
    from tirlab.adapters.verifiers import tasks
    found = tasks("vf_phone", task={"rewards": {"ninth": {"fn": "vf_phone:plugged", "weight": 0.9}}})
    environment = found.environment()
    first = environment.reset(**found.rows[0])
    user, = environment._reply("Hi there.")[:1]
    assert first == "Hello, Ada here." and environment._reply("So I did") is None
    completion = [{"role": "assistant", "content": "Hi there."}, {"role": "user", "content": user}, {"role": "assistant", "content": "So I did"}]
    score, = found.rewards[0](prompts=[found.rows[0]["prompt"]], completions=[completion], environments=[environment])
    trace = environment._rollout.trace
    assert type(score) is float and score == trace.reward == sum(r.score * r.weight for r in trace.rewards.values()) != 0


def write(folder, name, body):
    "Write a package of verifiers with a taskset `T` of tasks `K`."
    (folder / f"{name}.py").write_text(f"import verifiers.v1 as vf\n{body}\n__all__ = [n for n in ('T', 'E') if n in globals()]\n")
    sys.modules.pop(name, None)
    return name


PLAIN = "class T(vf.Taskset[K, vf.TasksetConfig]):\n    def load(self): yield K(vf.TaskData(prompt='x'), self.config.task)"
TASK = "class K(vf.Task[vf.TaskData]):\n"
REFUSED = {
    "a judge": (TASK + "    pass\n" + PLAIN, dict(task={"judges": [{"id": "reference"}]}), "ask the judge model"),
    "a judge of its own": ("class C(vf.TaskConfig):\n    judge: vf.JudgeConfig = vf.JudgeConfig(model='big')\nclass K(vf.Task[vf.TaskData, vf.State, C]):\n    pass\n" + PLAIN.replace(", self.config.task", ""), {}, "judge model big"),
    "a box": (TASK + "    @vf.reward\n    async def tests(self, trace: vf.Trace, runtime) -> float: return 1.0\n" + PLAIN, {}, "tests runs programs"),
    "a container": (TASK + "    NEEDS_CONTAINER = True\n" + PLAIN, {}, "container"),
    "an image": (TASK + "    pass\n" + PLAIN.replace("prompt='x'", "prompt='x', image='ubuntu'"), {}, "container"),
    "a rewrite": (TASK + "    @vf.intercept\n    async def hide(self, request: vf.Request): return None\n" + PLAIN, {}, "hide rewrites messages"),
    "an early stop": (TASK + "    @vf.stop\n    async def now(self, response: vf.Response) -> bool: return True\n" + PLAIN, {}, "now reads single requests"),
    "a server": (TASK + "    @classmethod\n    def toolsets(cls, config): return [S(vf.ToolsetConfig(url='http://x/mcp'))]\nclass S(vf.Toolset[vf.ToolsetConfig]): pass\n" + PLAIN, {}, "tasks=mcp/http://x/mcp"),
    "a program": (TASK + "    pass\n" + PLAIN + "\nclass C(vf.EnvConfig):\n    coder: vf.AgentConfig = vf.AgentConfig(harness={'id': 'codex'})\nclass E(vf.Env[C]):\n    async def run(self, task, agents): await agents.coder.run(task)", {}, "the program codex"),
    "two seats": (TASK + "    pass\n" + PLAIN, dict(env="user-sim"), "seats assistant, user"),
    "many tries": (TASK + "    pass\n" + PLAIN, dict(env="best-of-n"), "more than once"),
    "no tasks": (TASK + "    pass\n" + PLAIN.replace("yield", "return; yield"), {}, "has no tasks"),
    "a failing setup": (TASK + "    async def setup(self, trace, runtime): await runtime.run(['ls'], {})\n" + PLAIN, {}, "runtime.run"),
    "a split": (TASK + "    pass\n" + PLAIN, dict(split="test"), "does not take .*split"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_rolled_out_is_one_sentence_before_any_work(kind, tmp_path, monkeypatch):
    from tirlab.adapters.verifiers import tasks
    from tirlab.core.settings import SettingError
    body, options, words = REFUSED[kind]
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingError, match=words) as e: tasks(write(tmp_path, f"vf_refused_{list(REFUSED).index(kind)}", body), **options)
    assert "\n" not in str(e.value) and e.value.field


def test_names_ends_and_options():
    from tirlab.adapters.verifiers import tasks
    from tirlab.core.settings import SettingError
    for ask, words in ((lambda: tasks("no_such_environment"), "no verifiers environment no_such_environment"), (lambda: tasks("vf_game"), "has no end; say how many"),
                       (lambda: tasks("vf_game", n=1, hard="perhaps"), "hard='perhaps'")):
        with pytest.raises(SettingError, match=words): ask()
    assert [r["secret"] for r in tasks("vf_game", n=2, hard=True).rows] == [100, 101] and tasks("vf_game", "valid", 1).rows[0]["prompt"][0]["content"] == "valid: guess 0."
    assert [r["name"] for r in tasks("vf_sales", n=2).rows] == ["sale 3", "sale 10"] and sorted(tasks("vf_sales", shuffle=True, seed=1).rows["name"]) == sorted(tasks("vf_sales").rows["name"])


def test_an_environment_or_a_reward_that_fails_costs_its_own_rollout(tmp_path, monkeypatch):
    from tirlab.adapters.verifiers import tasks
    monkeypatch.syspath_prepend(tmp_path)
    load = "class T(vf.Taskset[K, vf.TasksetConfig]):\n    def load(self):\n        for i in range(3): yield K(vf.TaskData(prompt=f'{i}'), self.config.task)\n"
    body = TASK + "    @vf.reward\n    async def fine(self, trace: vf.Trace) -> float: return 1 / (self.data.idx - 1)\n" + load + \
        "class C(vf.EnvConfig):\n    agent: vf.AgentConfig = vf.AgentConfig()\nclass E(vf.Env[C]):\n    async def run(self, task, agents):\n        async with agents.agent.interaction(task) as talk:\n" \
        "            await talk.turn()\n            if task.data.idx == 2: raise KeyError('lost')\n            await talk.turn('and?')\n"
    found = tasks(write(tmp_path, "vf_fails", body))
    with scripted(lambda m: ["a", "b"]) as url, pytest.warns(UserWarning, match="has no reward"): done = here(found, url)
    assert done.rewards == [-1.0, None, None] and [len(t.turns) for t in done.trajectories] == [2, 2, 1]


def test_a_toolset_that_all_tasks_share_is_set_up_once(tmp_path, monkeypatch):
    from tirlab.adapters.verifiers import tasks
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{PACKAGES}:{tmp_path}")
    body = """
class Kept(vf.State):
    seen: int = 0
class Search(vf.Toolset[vf.SharedToolsetConfig, Kept]):
    begun = 0
    async def setup(self): type(self).begun += 1
    @vf.tool(name="look")
    async def look_up(self, word: str, more: list[str] = []) -> str:
        self.state.seen += 1
        return f"{word} {more} {self.state.seen} {self.begun}"
class K(vf.Task[vf.TaskData, Kept]):
    @vf.reward
    async def seen(self, trace: vf.Trace) -> float: return float(trace.state.seen)
class T(vf.Taskset[K, vf.TasksetConfig]):
    def load(self):
        for i in range(3): yield K(vf.TaskData(prompt=f"{i}"), self.config.task)
    @classmethod
    def toolsets(cls, config): return [Search(vf.SharedToolsetConfig())]
if __name__ == "__main__": Search.run()"""
    name = write(tmp_path, "vf_shared", body)
    found = tasks(name)
    with scripted(lambda m: [[call("search_look", word="a", more=["b"])], [call("search_look", word="c")], "done"]) as url:
        ours = here(found, url)
        traces = reference(name, url)
    compare(ours, traces, "vf_shared")
    assert [t.results[1].content for t in ours.trajectories] == ["c [] 2 1"] * 3 and ours.rewards == [2.0] * 3


def test_a_taskset_is_trained_on(tmp_path):
    "A step with the tiny policy: tools, turns of a user and rewards arrive in TRL."
    from tirlab.adapters.verifiers import tasks
    from tirlab.all import TIRConfig, TIRTrainer, tiny_policy
    for name, options in (("vf_sales", {}), ("vf_phone", {})):
        found, out = tasks(name, **options), tmp_path / name
        args = TIRConfig(output_dir=str(out), run_dir=str(out / "run"), per_device_train_batch_size=4, num_generations=4, max_completion_length=96, max_turn_length=16, max_steps=2, learning_rate=1e-3,
                         save_strategy="no", disable_tqdm=True, report_to="none")
        trainer = TIRTrainer(tiny_policy(), found.rewards, args, found.rows, environment_factory=found.environment)
        trainer.train()
        logged = [entry[f"rewards/{name}/mean"] for entry in trainer.state.log_history if f"rewards/{name}/mean" in entry]
        assert len(logged) == 2 and all(x == x for x in logged)
        assert name == "vf_sales" or any(m["role"] == "user" for t in trainer.batch.trajectories for m in t.messages)


# ---- and back

def polite(completions, log_metric, **row):
    log_metric("words", sum(len(c[-1]["content"].split()) for c in completions) / len(completions))
    return [1 / 4 if "please" in c[-1]["content"] else None for c in completions]


async def brief(completions, environments, wants, **row): return [1 / len(c) + len(e.sold) for c, e in zip(completions, environments)]


ROWS = Dataset.from_list([{"prompt": [{"role": "system", "content": "You sell."}, {"role": "user", "content": f"number {i}."}], "wants": w} for i, w in enumerate(("tea", "air", "milk"))])
SCRIPTS = [[[call("sell", ware="tea")], "There.", "Yes, please."], [[call("sell", ware="air"), call("sell", ware="tea")], [call("lend", ware="air")], [call("sell", ware="tea", number="x")], "No.", "No, please."],
           ["None.", [call("sell", ware="milk", number=2)], "Two."]]


@pytest.mark.parametrize("limits", [{}, dict(tool_rounds=1), dict(observation_chars=8)])
def test_a_tirlab_environment_in_verifiers_reads_and_earns_the_same(limits):
    from tirlab.adapters.export import as_verifiers
    wide = RolloutLimits(**dict(completion_tokens=2**20) | limits)
    seen = []
    with scripted(lambda m: SCRIPTS[int(next(x["content"] for x in m if x["role"] == "user").split()[1][0])], seen) as url:
        ours = evaluate(None, None, ROWS, Shop, [polite, brief], engine=Endpoint(url, "m", None), limits=wide, reward_weights=[0.5, 2.0])
        mine = [(b["messages"], b["tools"]) for b in seen]
        traces = there(as_verifiers(Shop, ROWS, [polite, brief], weights=[0.5, 2.0], limits=wide), url)
    sent = [(b["messages"], b["tools"]) for b in seen[len(mine):]]
    key = lambda x: (x[0][1]["content"], len(x[0]))
    assert sorted(sent, key=key) == sorted(mine, key=key)   # every request is the same, to the letter
    for trace, reward, *parts in zip(traces, ours.rewards, ours.by_function["polite"], ours.by_function["brief"], ours.by_function["Shop"]):
        assert trace.reward == pytest.approx(reward, rel=1e-6)
        assert [trace.rewards[n].score if n in trace.rewards else None for n in ("polite", "brief", "Shop")] == [p if p is None else pytest.approx(p, rel=1e-6) for p in parts]
    assert ours.metrics["words"] == pytest.approx(sum(t.metrics["words"] for t in traces) / 3)


def test_limits_of_verifiers_end_a_rollout_of_ours():
    import verifiers.v1 as vf
    from tirlab.adapters.export import as_verifiers
    as_verifiers(Shop, ROWS, [brief])
    env = vf.load_environment(vf.resolve_env_config({"taskset": {"id": "tirlab_rows"}, "agent": {"max_turns": 2}}))
    with scripted(lambda m: SCRIPTS[0]) as url: trace = there(env, url)[0]
    assert trace.stop_condition == "max_turns" and trace.ok and trace.num_turns == 2 and trace.rewards["Shop"].score == 1.0


def test_a_model_that_fails_fails_the_episode_with_its_reason():
    import verifiers.v1 as vf
    from tirlab.adapters.export import as_verifiers
    env = as_verifiers(Shop, ROWS, [brief])
    context = vf.ModelContext(model="m", client=vf.EvalClientConfig(base_url="http://127.0.0.1:9/v1", api_key_var="NO_SUCH_KEY"))
    async def go():
        async with env.serving(): return await env.run_episode(next(iter(env.taskset)), context)
    episode = asyncio.run(go())
    assert not episode.ok and episode.traces[0].errors[0].type == "ProviderError"


def test_names_of_modules_and_weights():
    from tirlab.adapters.export import as_verifiers
    for options, words in ((dict(name="json"), "already"), (dict(name="My Shop"), "not the name of a module"), (dict(weights=[1, 2]), "2 numbers for 1")):
        with pytest.raises(ValueError, match=words): as_verifiers(Shop, ROWS, [brief], **options)
