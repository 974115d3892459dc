"""The same words mean the same in train, eval, drift-check and demonstrate: what works, and the one sentence for what cannot."""

import json

import pandas as pd
import pytest

from tirlab.cli import main as cli
from tirlab.core.settings import SettingError
from tirlab.envs.tasks import make_tasks
from tirlab.eval import demonstrate, settings as eval_settings
from tirlab.eval.task_words import TaskWords, task_set
from tirlab.recipes import training

SHOP = '''
class Shop:
    "A shop with a till."
    def reset(self, stock=None, **row): self.stock, self.sold = stock or {}, 0
    def buy(self, fruit: str, count: int) -> str:
        """
        Buy fruit.

        Args:
            fruit: What to buy.
            count: How many.
        """
        if self.stock.get(fruit, 0) < count: raise ValueError(f"there are {self.stock.get(fruit, 0)} {fruit}")
        self.sold = count
        return f"{count} {fruit}"
    def get_reward(self): return float(self.sold > 0)

class Quiet:
    def reset(self, **row): pass

class Narrow(Shop):
    def reset(self, price): pass

class Breaks(Shop):
    def reset(self, **row): raise RuntimeError("the door is stuck")

class Untyped(Quiet):
    def look(self, where): "Look."

shop, number, nothing = Shop(), 3, []
def make_tasks(n=8, seed=0):
    call = '{"name": "buy", "arguments": {"fruit": "figs", "count": 1}}'
    return [{"prompt": f"Buy {i + seed} figs.", "stock": {"figs": 9}, "answer": "1 figs", "ground_truth": [call]} for i in range(n)]
def empty(): return []
def broken(): raise OSError("no such table")
def paid(completions, **kwargs): return [1.0] * len(completions)
def difficulty(completions, difficulty, **kwargs): return [0.0] * len(completions)
def weigh(fruit: str) -> str:
    """
    Weigh fruit.

    Args:
        fruit: What to weigh.
    """
    return "100 g"
'''
ROW = {"prompt": "Buy 1 figs.", "stock": {"figs": 9}, "answer": "1 figs", "ground_truth": ['{"name": "buy", "arguments": {"fruit": "figs", "count": 1}}']}


class Began(Exception):
    "All checks have passed."


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder with a shop and tasks in every kind of file; what would come after the checks raises Began."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "bad.py").write_text("import no_such_package")
    (tmp_path / "my.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "my.json").write_text(json.dumps([ROW]))
    (tmp_path / "sums.csv").write_text("question,answer\nWhat is 1+1?,2\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "unknown.jsonl").write_text(json.dumps(ROW | {"environment": "shop"}) + "\n")
    pd.DataFrame([ROW | {"stock": {"figs": 9}}]).to_parquet("my.parquet")
    make_tasks("lookup", n=2).to_json("lookup.jsonl")
    def began(*args, **kwargs): raise Began
    monkeypatch.setattr(training, "TIRTrainer", began)
    monkeypatch.setattr(eval_settings, "eval_sampler", began)
    monkeypatch.setattr(demonstrate, "load_ends", began)
    return tmp_path


VERBS = ("train", "eval", "drift-check", "demonstrate")
SHOPS = ["environment=shop.py:Shop"]
GOOD = {
    "built-in": ["tasks=lookup", "level=2", "n=4"], "jsonl": ["tasks=my.jsonl", *SHOPS], "json": ["tasks=my.json", *SHOPS, "reward=answer"], "parquet": ["tasks=my.parquet", *SHOPS, "reward=environment"],
    "routed": ["tasks=lookup.jsonl"], "function": ["tasks=shop.py:make_tasks", "n=3", *SHOPS, "reward=shop.py:paid,environment"], "options": ["tasks=shop.py:make_tasks", *SHOPS, "task_options={seed: 3}"],
    "tools": ["tasks=my.jsonl", "tools=shop.py:weigh", "environment=none", "reward=shop.py:paid"], "python": ["tasks=my.jsonl", "environment=python", "reward=answer"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("words", GOOD.values(), ids=list(GOOD))
def test_every_verb_reads_every_source(verb, words, desk):
    with pytest.raises(Began): cli.main([verb, *words])


BAD = {   # words -> field, and a piece of the sentence
    "a family": (["tasks=aritmetic"], "the nearest is arithmetic"), "a file": (["tasks=nowhere.jsonl"], "There is no file nowhere.jsonl"), "no rows": (["tasks=empty.jsonl", *SHOPS], "tasks=empty.jsonl has no rows"),
    "no made rows": (["tasks=shop.py:empty", *SHOPS], "tasks=shop.py:empty has no rows"), "a number": (["tasks=shop.py:number", *SHOPS], "give a list of rows"), "raises": (["tasks=shop.py:broken", *SHOPS], "no such table"),
    "a hub name": (["tasks=bcfl/base"], "or did you mean bfcl"), "no module": (["tasks=bad.py:tasks", *SHOPS], "no_such_package"), "options": (["tasks=lookup", "task_options={a: 1}"], "task_options are of a function"),
    "a split": (["tasks=lookup", "split=tets"], "the nearest is test"), "n": (["tasks=lookup", "n=0"], "n=0"), "level": (["tasks=lookup", "level=99"], "level=99 is not"), "a key": (["taskz=lookup"], "the nearest is tasks"),
    "no class": (["tasks=my.jsonl", "environment=shop.py:Shopp"], "the nearest name in it is Shop"), "an instance": (["tasks=my.jsonl", "environment=shop.py:shop"], "environment=shop.py:shop is an instance of Shop; give its class, shop.py:Shop"),
    "no environment": (["tasks=my.jsonl", "environment=shop.py:number"], "of the type int"), "a word": (["tasks=my.jsonl", "environment=pyton"], "the nearest is python"),
    "a narrow reset": (["tasks=my.jsonl", "environment=shop.py:Narrow"], "environment=shop.py:Narrow: `reset` of Narrow"), "a reset that raises": (["tasks=my.jsonl", "environment=shop.py:Breaks"], "the door is stuck"),
    "an untyped tool": (["tasks=my.jsonl", "environment=shop.py:Untyped"], "no type hint"), "another environment": (["tasks=lookup", "environment=shop.py:Breaks"], "the door is stuck"),
    "reward": (["tasks=my.jsonl", *SHOPS, "reward=shop.py:number"], "reward=shop.py:number is of the type int"),
    "a reward's column": (["tasks=my.jsonl", *SHOPS, "reward=shop.py:difficulty"], "reward=shop.py:difficulty: Task 0 has no difficulty"), "a reward's word": (["tasks=my.jsonl", *SHOPS, "reward=anser"], "the nearest is answer"),
    "no get_reward": (["tasks=my.jsonl", "environment=shop.py:Quiet", "reward=environment"], "reward=environment needs an environment with a method get_reward"),
    "tools": (["tasks=my.jsonl", "tools=shop.py:paid", *SHOPS], "tools=shop.py:paid: Tool `paid`"), "no tool": (["tasks=my.jsonl", "tools=shop.py:weight", *SHOPS], "the nearest name in it is weigh"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("words,said", BAD.values(), ids=list(BAD))
def test_what_does_not_fit_is_one_sentence_in_every_verb(verb, words, said, desk, capfd):
    assert cli.main([verb, *words]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("tirlab: ") and said in lines[0], lines
    assert not list(desk.glob("runs/*")), "nothing is left behind"


def test_a_name_that_no_environment_has(desk):
    (desk / "dict.py").write_text(f"{SHOP}\nWORLD = {{'market': Shop}}")
    with pytest.raises(SettingError) as e: task_set(TaskWords(tasks="unknown.jsonl", environment="dict.py:WORLD"))
    assert (e.value.field, e.value.value) == ("environment", "shop")


def test_rows_keep_what_their_environment_reads(desk):
    for source in ("my.jsonl", "my.json", "my.parquet", "shop.py:make_tasks"):
        found = task_set(TaskWords(tasks=source, n=1, environment="shop.py:Shop"))
        assert found.rows[0]["stock"] == {"figs": 9} and found.rows[0]["prompt"][0]["role"] == "user" and found.environment.__name__ == "Shop" and found.rewards == []
    routed = task_set(TaskWords(tasks="lookup.jsonl"))
    assert routed.environment["lookup"].__name__ == "LookupEnvironment" and "state" in routed.rows.column_names
    sums = task_set(TaskWords(tasks="sums.csv"))
    assert sums.rows[0]["answer"] == "2" and [r.__name__ for r in sums.rewards] == ["math_reward"]


def test_words_stand_in_a_file_as_well(desk):
    (desk / "my.yaml").write_text("tasks: my.jsonl\nenvironment: shop.py:Shop\nreward: environment\n")
    for verb in VERBS:
        with pytest.raises(Began): cli.main([verb, "config=my.yaml"])


def test_demonstrations_and_drift_of_tasks_of_ones_own(desk, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(desk)
    words = ["tasks=shop.py:make_tasks", "n=2", *SHOPS, "reward=answer", "call_format=json"]
    assert cli.main(["demonstrate", *words, "out=d.jsonl"]) == 0
    lines = [json.loads(line) for line in (desk / "d.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["reward"] == 2 and [m["role"] for m in lines[0]["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert len(lines[0]["mask"]) == len(lines[0]["completion_ids"]) > sum(lines[0]["mask"]) > 0
    assert cli.main(["drift-check", *words]) == 0
    assert "ok: the loss sees" in capsys.readouterr().out


# ---- what is listed, and the first command

def test_train_alone_says_how_to_begin(capsys, monkeypatch):
    monkeypatch.setattr(training, "train_recipe", lambda *a: pytest.fail("training began"))
    assert cli.main(["train"]) == 2
    out = capsys.readouterr().out
    assert "tirlab train recipe=" in out and len(out.splitlines()) < 12


@pytest.mark.parametrize("words,said", [(["recipes"], "2509.02479"), (["recipes", "gtpo"], "inferred"), (["environments"], "reasoning_gym"), (["train", "settings"], "Advantage: "), (["train", "settings", "num_generations_eval"], "num_generations_eval"),
                                        (["eval", "settings"], "environment")])
def test_what_there_is(words, said, capsys):
    assert cli.main(words) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("words,said", [(["recipes", "simpeltir"], "the nearest is simpletir"), (["train", "settings", "xyzzy"], "No setting has 'xyzzy'"), (["compare", "a"], "A... vs B..."), (["compare", "a", "b"], "There is no run folder at a")])
def test_unknown_names(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_version_and_the_older_name_of_compare(capsys):
    for words, said in ((["--version"], "tirlab 0."), (["eval", "compare", "--help"], "usage: tirlab compare")):
        with pytest.raises(SystemExit) as e: cli.main(words)
        assert e.value.code == 0 and capsys.readouterr().out.startswith(said)
