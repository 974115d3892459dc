"""The shop of the guide "your own environment": its file is the guide's text, it runs, and in full length it learns."""

import re
from pathlib import Path

import pytest

from tirlab.all import RolloutLimits, TIRConfig, TIRTrainer, answer_reward, evaluate, open_run, tiny_policy
from tirlab.core.objects import load_objects

DOCS = Path(__file__).resolve().parents[2] / "docs"
SHORT = dict(max_steps=1, per_device_train_batch_size=8, learning_rate=1e-3, num_generations=8, max_completion_length=80, save_strategy="no", disable_tqdm=True, report_to="none")


@pytest.fixture(scope="module")
def shop(): return load_objects(f"{DOCS / 'shop.py'}:Shop,rows", "environment")


def test_the_guide_shows_the_file():
    shown = re.search(r"^```py\n(.*?)^```", (DOCS / "environments.md").read_text(), re.M | re.S)[1]
    assert shown == (DOCS / "shop.py").read_text() and sum(bool(line.strip()) for line in shown.splitlines()) <= 30


def test_its_methods(shop):
    Shop, rows = shop
    for row in rows(40, 3):
        s = Shop()
        s.reset(**row)
        words = row["prompt"][0]["content"].replace("?", "").replace(".", "").split()
        if words[0] == "What": assert s.read(s.find(words[6], int(words[4]))) == row["answer"]
        else:
            try: said = s.book(words[4], int(words[2]))
            except ValueError as e: said = s.book(words[4], int(str(e).split()[-1]))
            assert said == row["answer"]
    assert s.python("3+4") == "7"


def test_a_step(shop, tmp_path):
    Shop, rows = shop
    t = TIRTrainer(tiny_policy(), answer_reward, TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), advantage="gtpo", **SHORT), rows(8), environment_factory=Shop)
    t.train()
    run = open_run(tmp_path / "run")
    assert [tool.__name__ for tool in t.tools] == ["book", "find", "python", "read"] and all("Shop" in dict(run.trajectory(i).turn_scores) for i in run.index().id)
    found = evaluate(t.model, t.processing_class, rows(4, 9), Shop, answer_reward, limits=RolloutLimits(80), turn_reward_funcs=[lambda trajectory, row: [1.0] * len(trajectory.turns)])
    assert all(set(x.turn_scores) == {"Shop", "<lambda>"} and len(x.turn_scores["Shop"]) == len(x.turns) for x in found.trajectories)


@pytest.mark.slow
def test_it_learns(shop, tmp_path):
    Shop, rows = shop
    long = SHORT | dict(max_steps=30, per_device_train_batch_size=64, max_completion_length=160)
    t = TIRTrainer(tiny_policy(), answer_reward, TIRConfig(output_dir=str(tmp_path), advantage="gtpo", trace=False, **long), rows(), environment_factory=Shop)
    measure = lambda: evaluate(t.model, t.processing_class, rows(128, 99), Shop, answer_reward, limits=RolloutLimits(160)).success
    before = measure()
    t.train()
    assert before < 0.4 and measure() > 0.8
