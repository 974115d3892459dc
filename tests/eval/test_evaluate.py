"""Evaluation: estimates against exact arithmetic, runs that are killed, cells, and the command line."""
import json
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from datasets import Dataset
from forks import forked
from transformers import AutoModelForCausalLM, AutoTokenizer

from tirlab.cli import main as cli
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.engines import EngineError, GenerateEngine, Sampling
from tirlab.eval.estimates import compare, compare_runs, interval, item_scores, majority_vote, pass_at_k, read_items, result_of, summary
from tirlab.eval.runs import Sampler, evaluate_run
from tirlab.eval.settings import PROTOCOLS, eval_cells, read_eval_settings
from tirlab.eval.sources import task_source
from tirlab.eval.task_words import task_set
from tirlab.eval.evaluate import evaluate, evaluate_cells
from tirlab.rewards.patterns import cross_verifications, error_corrections, pattern_judge, pattern_shares, progress_steps, reasoning_patterns
from tirlab.plots.token_html import token_html
from tirlab.rewards.outcome import math_equal
from tirlab.envs.tasks import ENVIRONMENTS, make_tasks
from tirlab.core.tiny import tiny_policy
from tirlab.traces.run import RunError, open_run

LIMITS = RolloutLimits(96)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(tiny_policy()).eval(), AutoTokenizer.from_pretrained(tiny_policy())


def sampler(policy, wrap=lambda engine: engine, limits=LIMITS):
    return Sampler(wrap(GenerateEngine(*policy, False)), policy[1], environment_factory=ENVIRONMENTS, limits=limits)


# Estimates

def test_pass_at_k_is_the_closed_form():
    rng, sizes = np.random.default_rng(0), (5, 64, 1024)
    for _ in range(1000):
        n = int(rng.integers(1, sizes[rng.integers(3)] + 1))
        c, k = int(rng.integers(0, n + 1)), int(rng.integers(1, n + 1))
        assert float(pass_at_k(n, c, k)) == pytest.approx(float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))), abs=1e-12)


def test_pass_at_k_is_unbiased_and_knows_its_limits():
    rng = np.random.default_rng(1)
    assert pass_at_k(10, rng.binomial(10, 0.2, 20000), 4).mean() == pytest.approx(1 - 0.8 ** 4, abs=0.01)
    assert np.isnan(pass_at_k(3, 1, 4)) and pass_at_k(4, 4, 4) == 1 and pass_at_k(4, 0, 4) == 0
    with pytest.raises(ValueError, match="no more right tries than tries"): pass_at_k(3, 4, 1)


@pytest.mark.parametrize("items,tries,a,b", [(30, 1, 1, 1), (30, 8, 0.2, 3), (100, 8, 0.5, 0.1)])
def test_intervals_hold_the_truth_in_95_of_100_benchmarks(items, tries, a, b):
    rng, held, times = np.random.default_rng(items * tries), 0, 1200
    for p in rng.beta(a, b, (times, items)):
        low, high = interval(rng.binomial(tries, p) / tries, draws=300, seed=int(rng.integers(2**31)))
        held += low <= a / (a + b) <= high
    assert 0.93 <= held / times <= 0.97


def test_a_difference_is_told_when_there_is_one_and_rarely_when_there_is_none():
    rng, told = np.random.default_rng(2), [0, 0]
    for _ in range(400):
        p = rng.beta(1, 1, 50)
        for i, gain in enumerate((0, 0.15)):
            x, y = (dict(enumerate(rng.binomial(8, q) / 8)) for q in (p, np.minimum(1, p + gain)))
            told[i] += compare(x, y, draws=500).real
    assert told[0] / 400 <= 0.08 and told[1] / 400 >= 0.95


def test_comparison_pairs_items_and_leaves_out_what_one_lacks():
    d = compare({"a": 1.0, "b": 0.0, "c": float("nan"), "d": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0, "e": 0.0})
    assert d.items == 2 and d.mean == 0.5 and not d.real
    assert str(compare({"a": 1.0}, {"b": 1.0})) == "There is no item that both have scored."


def test_votes_and_summaries():
    assert majority_vote(["0.5", "\\frac{1}{2}", "3", "3"], [1, 1, 0, 0]) == 0   # as texts
    assert majority_vote(["0.5", "\\frac{1}{2}", "1/2", "3", "3"], [1, 1, 1, 0, 0], lambda a, b: math_equal(f"\\boxed{{{a}}}", b)) == 1
    found = summary([[1, 0, None, None], [None] * 4], answers=[["1", "2", None, None], [None] * 4])
    assert found["avg@4"].mean == 0.5 and found["avg@4"].items == 1 and found["pass@2"].mean == 1 and found["pass@4"].items == 0 and found["maj@4"].mean == 0.5


# Runs

class Stopped(Exception): pass


class Stops:
    "An engine that breaks after so many turns."
    def __init__(self, engine, turns, error): self.engine, self.left, self.error = engine, turns, error
    def ready(self): return self.engine.ready()
    async def generate(self, ids, sampling):
        self.left -= 1
        if self.left < 0: raise self.error
        return await self.engine.generate(ids, sampling)


def test_a_run_goes_on_and_gives_what_it_would_have_given(policy, tmp_path):
    tasks = make_tasks("all", "test", 9)
    run = lambda name, **more: evaluate_run(tmp_path / name, {"chat": (tasks, None)}, sampler(policy, **more), k=2, batch_size=6)
    with pytest.raises(Stopped): run("a", wrap=lambda e: Stops(e, 20, Stopped()))
    assert open_run(tmp_path / "a").status() == "failed" and 0 < len(read_items(tmp_path / "a")) < 9
    result, whole = run("a"), run("b")
    assert result["cells"] == whole["cells"] and result["complete"] and read_items(tmp_path / "a") == read_items(tmp_path / "b")
    plain = evaluate(*policy, tasks, ENVIRONMENTS, k=2, limits=LIMITS, batch_size=6)
    assert plain.estimates()["avg@2"].mean == result["cells"]["chat"]["estimates"]["avg@2"]["mean"]
    left, right = (open_run(tmp_path / name) for name in "ab")
    assert left.status() == "finished" and sorted(left.index().id) == sorted(right.index().id) and len(left.index()) == 18 and set(left.index().split) == {"eval"}
    for name in left.index().id[::7]:
        assert list(left.trajectory(name).ids) == list(right.trajectory(name).ids) and left.trajectory(name).reward == right.trajectory(name).reward
    before = (tmp_path / "a/index.jsonl").read_bytes()
    assert run("a", wrap=lambda e: Stops(e, 0, Stopped())) == result and (tmp_path / "a/index.jsonl").read_bytes() == before   # finished: nothing is sampled


def test_a_killed_process_goes_on(tmp_path):
    words = ["tasks=arithmetic", "n=12", "k=2", "max_completion_length=64", "batch_size=4"]
    process, end = forked(cli.main, ["eval", *words, f"out={tmp_path}/a"], said=tmp_path / "said"), time.monotonic() + 120
    while time.monotonic() < end and process.is_alive() and not (tmp_path / "a/items.jsonl").exists(): time.sleep(0.02)
    process.kill()
    process.join()
    with open(tmp_path / "a/items.jsonl", "a") as f: f.write('{"cell": "chat", "item": 11, "rewa')   # a line that the kill tore
    assert 0 < len(read_items(tmp_path / "a")) < 12
    assert cli.main(["eval", *words, f"out={tmp_path}/a"]) == 0 and cli.main(["eval", *words, f"out={tmp_path}/b"]) == 0
    assert read_items(tmp_path / "a") == read_items(tmp_path / "b") and result_of(tmp_path / "a")["cells"] == result_of(tmp_path / "b")["cells"]


def test_tries_that_fail_are_kept_marked_and_made_again(policy, tmp_path):
    cells = {"chat": (make_tasks("arithmetic", "test", 4), None)}
    part = evaluate_run(tmp_path / "a", cells, sampler(policy, lambda e: Stops(e, 7, EngineError("the machine is on fire"))), k=2, batch_size=4)
    assert not part["complete"] and part["failed"] > 0 and "the machine is on fire" in part["problem"]
    assert open_run(tmp_path / "a").status() == "interrupted"
    index = open_run(tmp_path / "a").index()
    assert (index.stop == "failed").sum() == part["failed"] and index[index.stop == "failed"].dropped.str.contains("on fire").all() and index[index.stop == "failed"].reward.isna().all()
    again, whole = (evaluate_run(tmp_path / name, cells, sampler(policy), k=2, batch_size=4) for name in "ab")
    assert again["complete"] and again["cells"] == whole["cells"]


@pytest.mark.parametrize("change", [dict(k=3), dict(seed=1), dict(sampling=Sampling(2**31, 0.5))])
def test_a_folder_is_not_gone_on_with_under_other_settings(policy, tmp_path, change):
    cells = {"chat": (make_tasks("arithmetic", "test", 1), None)}
    evaluate_run(tmp_path, cells, sampler(policy), k=1)
    with pytest.raises(ValueError, match="was begun with"): evaluate_run(tmp_path, cells, sampler(policy), **{"k": 1} | change)


def test_four_cells_are_the_same_items_in_two_formats(policy, tmp_path):
    settings = read_eval_settings(["tasks=repair", "n=3", "ood=xml"])
    cells = eval_cells(settings, task_set(settings))
    assert list(cells) == ["test/chat", "test/xml", "content_ood/chat", "content_ood/xml"]
    assert cells["test/chat"][0].to_list() == cells["test/xml"][0].to_list() != cells["content_ood/chat"][0].to_list()
    result = evaluate_run(tmp_path, cells, sampler(policy))
    inside = evaluate_cells(*policy, {s: cells[f"{s}/chat"][0] for s in ("test", "content_ood")}, [None, "xml"], ENVIRONMENTS, limits=LIMITS)
    for (split, f), e in inside.items(): assert e.success == result["cells"][f"{split}/{f}"]["estimates"]["avg@1"]["mean"]
    prompts = {i: "".join(open_run(tmp_path).trajectory(f"test-{f}-00000-000").prompt_text) for i, f in enumerate(("chat", "xml"))}
    asked = cells["test/chat"][0][0]["prompt"][0]["content"]
    assert prompts[0] != prompts[1] and all(asked in p for p in prompts.values())


def test_two_runs_are_compared_item_by_item(policy, tmp_path, capsys):
    tasks = make_tasks("lookup", "test", 6)
    for name, temperature in (("a", 1.0), ("b", 0.0)): evaluate_run(tmp_path / name, {"chat": (tasks, None)}, sampler(policy), sampling=Sampling(2**31, temperature))
    (found,) = compare_runs(tmp_path / "a", tmp_path / "b").values()
    a, b = (item_scores(tmp_path / name)["chat"] for name in "ab")
    assert found.items == 6 and found.mean == pytest.approx(np.mean([b[k] - a[k] for k in a]))
    assert cli.main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["chat"]["real"] == found.real
    evaluate_run(tmp_path / "c", {"chat": (make_tasks("repair", "test", 2), None)}, sampler(policy))
    with pytest.raises(ValueError, match="no task in common"): compare_runs(tmp_path / "a", tmp_path / "c")
    with pytest.raises(RunError): compare_runs(tmp_path / "a", tmp_path / "nowhere")


# The command line

def test_eval_prints_a_table_and_json_and_a_folder_that_the_app_opens(tmp_path, capsys):
    words = ["eval", "tasks=repair", "n=3", "k=2", "max_completion_length=96", f"out={tmp_path}/run", "--json"]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    assert result["complete"] and result["cells"]["chat"]["items"] == 3 and "avg@2" in shown.err and "evaluating" in shown.err
    run = open_run(result["run_dir"])
    row = run.trajectory(run.index().id[0])
    assert row.split == "eval" and len(row.ids) and not np.isnan(row.sampling_logprob[row.mask == 1]).any() and token_html(row)
    assert run.metrics()["eval/chat/avg@2"].iloc[0] == result["cells"]["chat"]["estimates"]["avg@2"]["mean"]


@pytest.mark.parametrize("words,said", [
    (["tasks=aime"], "Unknown tasks"), (["tasks=nobody.jsonl"], "no file nobody.jsonl"), (["format=yaml"], "Unknown call format 'yaml'"), (["ood=chat"], "is the format of training"),
    (["k=0"], "nothing to evaluate"), (["k=4", "recipe=tool_rl_box"], "all the same"), (["endpoint=http://127.0.0.1:9"], "needs model=NAME"), (["endpoint=localhost", "model=m"], "give the whole address"),
    (["engine=llama"], "Unknown engine"), (["model=/no/such/model"], "cannot be loaded"), (["reward=best"], "is unknown; the nearest is"), (["temperature=-1"], "temperature=-1 is not a number from 0 on"), (["n=0"], "at least one task"),
])
def test_bad_input_is_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["eval", *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("tirlab: ") and said in last and not list(tmp_path.glob("runs/*"))


def test_a_benchmark_that_is_not_installed_names_its_command(monkeypatch):
    from importlib.metadata import PackageNotFoundError
    from tirlab.envs import bfcl_data
    def missing(name): raise PackageNotFoundError(name)
    monkeypatch.setattr(bfcl_data, "version", missing)
    bfcl_data.require_bfcl.cache_clear()
    try:
        with pytest.raises(ValueError, match="pip install --no-deps bfcl-eval"): task_source("bfcl/base", n=2)
    finally: bfcl_data.require_bfcl.cache_clear()


def test_protocols_are_what_the_papers_say():
    assert {k: PROTOCOLS["simpletir"].sets[k] for k in ("k", "temperature")} == dict(k=32, temperature=1.0) and PROTOCOLS["tool_rl_box"].sets["temperature"] == 0
    for key in ("recipe", "preset"):   # its older name
        settings = read_eval_settings([f"{key}=simpletir", "k=4"])
        assert settings.k == 4 and settings.first_call_only is True and settings.max_completion_length == 12000


def test_a_task_without_an_answer_is_refused_before_anything_is_sampled(policy, tmp_path):
    rows = Dataset.from_list([*make_tasks("arithmetic", "test", 2), make_tasks("arithmetic", "test", 3)[2] | {"answer": None}])
    with pytest.raises(ValueError, match="Task 2 has no answer"): evaluate_run(tmp_path / "a", {"chat": (rows, None)}, sampler(policy, lambda e: Stops(e, 0, Stopped())))
    with pytest.raises(ValueError, match="Task 2 has no answer"): evaluate(*policy, rows, ENVIRONMENTS)
    assert not (tmp_path / "a").exists()


# Reasoning patterns

def turn(code, said=""): return {"role": "assistant", "content": said, "tool_calls": [{"type": "function", "function": {"name": "python", "arguments": {"code": code}}}]}
def tool(text): return {"role": "tool", "name": "python", "content": text}


@pytest.mark.parametrize("count,yes,no", [
    (error_corrections, [turn("1/0"), tool("ZeroDivisionError: division by zero"), turn("1/1"), tool("1.0")], [turn("1/0"), tool("ZeroDivisionError: division by zero"), turn("1/0"), tool("ZeroDivisionError: x")]),
    (error_corrections, [turn("x"), tool("{'error': 'no'}"), turn("y"), tool("5"), turn("z"), tool("6")], [turn("y"), tool("5"), turn("z"), tool("6")]),
    (progress_steps, [turn("12*12"), tool("144"), turn("144+1"), tool("145")], [turn("12*12"), tool("144"), turn("12*12+1"), tool("145")]),
    (cross_verifications, [turn("12*12"), tool("144"), turn("sum([12]*12)"), tool("144")], [turn("12*12"), tool("144"), turn("12*12"), tool("144")]),
    (cross_verifications, [turn("12*12"), tool("144"), turn("12**2 == 144"), tool("True")], [turn("12**2 == 144"), tool("True")]),
    (cross_verifications, [turn("12*12"), tool("144"), turn("f(12)", "Let me verify that."), tool("done")], [turn("12*12"), tool("144"), turn("print(144)"), tool("144")]),
])
def test_patterns_are_found_where_they_are_and_not_elsewhere(count, yes, no):
    assert count(yes) == 1 and count(no) == 0


def test_a_judge_takes_the_place_of_the_rules_or_says_that_it_cannot():
    talk = [turn("1"), tool("1")]
    answer = '{"cross_verification": true, "error_correction": false, "progressive_reasoning": false}'
    assert pattern_shares([talk], pattern_judge(lambda prompt: answer)) == json.loads(answer) and not any(reasoning_patterns(talk).values())
    with pytest.raises(ValueError, match="did not answer as asked"): pattern_judge(lambda prompt: "yes")(talk)
