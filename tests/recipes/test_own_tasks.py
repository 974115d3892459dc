"""Training on tasks of one's own from the command line: a base model without a template, evaluation on the way, several seeds."""
import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tirlab.cli.main import main
from tirlab.core.chat_templates import PLAIN_TEMPLATE
from tirlab.core.tiny import tiny_policy
from tirlab.envs.environments import PythonEnvironment
from tirlab.envs.tasks import make_tasks
from tirlab.eval.evaluate import evaluate
from tirlab.recipes import seeds
from tirlab.rollout.calls import RolloutLimits
from tirlab.traces.meta import runs_below
from tirlab.traces.run import open_run

SMALL = ["num_generations=4", "per_device_train_batch_size=8", "steps_per_generation=1", "max_completion_length=64", "n=8", "level=1", "learning_rate=1e-4", "save_strategy=no", "report_to=none"]
SHOP = '''
class Shop:
    "A shop with a till."
    def reset(self, stock, **row): self.stock, self.sold = stock, 0
    def buy(self, fruit: str, count: int) -> str:
        """
        Buy fruit.

        Args:
            fruit: What to buy.
            count: How many.
        """
        self.sold = count
        return f"{count} {fruit}"
    def get_reward(self): return float(self.sold > 0)
def make_rows(n=8, split="train"): return [{"prompt": f"Buy {i} figs.", "stock": {"figs": i}, "of": split} for i in range(n)]
'''


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A random model of Qwen3's shape whose tokenizer never saw a template."
    folder = tmp_path_factory.mktemp("base")
    tok = AutoTokenizer.from_pretrained(tiny_policy())
    tok.chat_template, tok.response_template = None, None
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                 eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)).save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return str(folder)


def test_zero_rl_of_a_base_model(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"model={base}"]) == 2 and "chat template" in capsys.readouterr().err
    words = [f"model={base}", "chat_template=plain", "call_format=fenced"]
    assert main(["train", "recipe=simpletir", *words, "max_steps=2", "output_dir=out", *SMALL]) == 0
    run = open_run(runs_below("out")[0])
    row = run.trajectory(run.index().id[0])
    prompt = "".join(row.prompt_text)
    assert prompt.endswith("Assistant:\n") and prompt.count("User:\n") == 1 and "```python" in prompt
    assert main(["drift-check", *words]) == 0


def test_a_plain_template_in_python(base):
    model, tok = Qwen3ForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    done = evaluate(model, tok, make_tasks("arithmetic", "test", 2), PythonEnvironment, limits=RolloutLimits(16), call_format="fenced", chat_template="plain")
    assert tok.decode(done.trajectories[0].prompt_ids).endswith("Assistant:\n")
    text = lambda messages: tok.apply_chat_template(messages, chat_template=PLAIN_TEMPLATE, tokenize=False)
    talk = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert text(talk) == f"S\n\nUser:\na\n\nAssistant:\nb{tok.eos_token}\n\nUser:\nc\n\n" and text(talk).startswith(text(talk[:3]))


def test_an_environment_of_ones_own_is_trained_evaluated_and_followed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(SHOP)
    words = ["tasks=shop.py:make_rows", "environment=shop.py:Shop", "reward=environment"]
    small = [w for w in SMALL if not w.startswith("level")]
    assert main(["train", *words, "eval_tasks=shop.py:make_rows", "eval_n=4", "eval_steps=1", "max_steps=2", "output_dir=out", *small]) == 0
    metrics = open_run(runs_below("out")[0]).metrics()
    held = metrics[metrics.split == "eval"]
    assert list(held.step) == [1, 2] and held.reward.notna().all() and held["rewards/Shop/mean"].notna().all()
    assert main(["eval", *words, "n=4", "out=evaluated", "max_completion_length=64", "seeds=0,1"]) == 0
    out = capsys.readouterr().out
    assert "seed 0" in out and "95% interval" in out and len(runs_below("evaluated")) == 2
    (tmp_path / "shop.py").write_text(SHOP.replace("self.sold > 0", "self.sold > 1"))
    assert main(["eval", *words, "n=4", "out=evaluated", "max_completion_length=64", "seeds=0,1"]) == 2, "another environment is another evaluation"
    assert "code" in capsys.readouterr().err


def test_an_evaluation_needs_tasks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "eval_strategy=steps"]) == 2 and "eval_tasks=arithmetic" in capsys.readouterr().err
    (tmp_path / "shop.py").write_text(SHOP)
    assert main(["train", "eval_tasks=shop.py:make_rows"]) == 2
    capsys.readouterr()
    assert main(["train", "tasks=shop.py:make_rows", "environment=shop.py:Shop", "eval_tasks=nowhere.jsonl"]) == 2 and "nowhere.jsonl" in capsys.readouterr().err


def test_seeds_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    "The second seed is interrupted; --resume passes over the first, and trains the second and the third."
    monkeypatch.chdir(tmp_path)
    trained, real = [], seeds.train_recipe
    def train(settings, resume=False):
        trained.append((settings["seed"], resume))
        if len(trained) == 2: raise KeyboardInterrupt
        return real(settings, resume)
    monkeypatch.setattr(seeds, "train_recipe", train)
    words = ["train", "tasks=arithmetic", "seeds=0,1,2", "max_steps=1", "output_dir=out", *SMALL]
    assert main(words) == 130
    assert main(words) == 2 and "--resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert trained == [(0, False), (1, False), (1, False), (2, False)]
    out = capsys.readouterr().out
    assert "Seed 0 is done" in out and "reward" in out and json.loads((tmp_path / "out/seeds.json").read_text())["seeds"] == [0, 1, 2]
    assert len(runs_below("out")) == 3
