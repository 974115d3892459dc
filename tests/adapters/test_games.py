"""Games of TextArena and tasks of reasoning-gym with their real packages: rewards are the packages' own, and both train and evaluate."""

import json
import random
import threading
from collections import deque
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.adapter
pytest.importorskip("reasoning_gym"), pytest.importorskip("textarena")

import reasoning_gym
import textarena
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer
from textarena.envs.registration import ENV_REGISTRY

from tirlab.adapters import reasoning_gym as gym
from tirlab.adapters.task_set import adapter_tasks
from tirlab.adapters.textarena import TextArenaEnvironment, TextArenaTool, begin, observed
from tirlab.core.tiny import tiny_policy, tiny_tokenizer
from tirlab.core.trajectory import StopReason
from tirlab.eval.evaluate import evaluate
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.loop import open_row
from tirlab.supervision.demonstrations import demonstrate

TOK = tiny_tokenizer()
TOK.model_max_length = 2**20
SLOW = {"knight_swap"}   # 5 to 15 s a task
UNSEEDED = {"list_functions"}   # the package makes another task each time; ours are the same for a seed
NAMES = sorted(set(DATASETS) - {"composite"} - SLOW)
says = lambda text: [{"role": "assistant", "content": text}]


# reasoning-gym

def score(dataset, answer, entry):
    "What the package gives; 0 where it raises."
    try: return float(dataset.score_answer(answer, entry))
    except Exception: return 0.0


@pytest.mark.parametrize("part", range(4))
def test_every_dataset_scores_as_the_package_does(part):
    gold = {}
    for name in NAMES[part::4]:
        n = 1 if name in ("futoshiki", "arc_agi", "group_anagrams", "codeio") else 2
        rows = adapter_tasks(f"reasoning_gym/{name}", n=n).rows
        dataset = reasoning_gym.create_dataset(name, seed=gym.first_seed("train", 0), size=n)
        for i, row in enumerate(rows):
            entry = gym.read_entry(row["entry"])
            assert row["prompt"][-1]["content"] == entry["question"] and (name in UNSEEDED or entry == dataset[i])
            answer = entry["answer"]
            tried = [answer, "0", "", "((", "yes", *([f"{answer} ", f"{answer} x", answer[:len(answer) // 2]] if answer else [])]
            for text in filter(lambda t: t is not None, tried):
                said = f"Let me see. <answer>{text}</answer>"
                ours = gym.reasoning_gym_reward([says(said)], [name], ["{}"], [row["entry"]])[0]
                assert ours == score(dataset, extract_answer(said), entry), (name, text)
            assert gym.reasoning_gym_reward([says("no tag"), []], [name] * 2, ["{}"] * 2, [row["entry"]] * 2) == [score(dataset, None, entry), score(dataset, extract_answer(""), entry)]
            gold[name] = score(dataset, answer, entry)
    assert {name for name, v in gold.items() if v != 1} <= {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}   # these have no answer of their own


def test_splits_and_seeds_do_not_meet():
    made = {(s, seed): set(adapter_tasks("reasoning_gym/base_conversion", split=s, n=100, seed=seed).rows["entry"]) for s in ("train", "test") for seed in (0, 1)}
    assert all(len(a) == 100 for a in made.values()) and not any(made[a] & made[b] for a in made for b in made if a != b)
    assert made["train", 0] == set(adapter_tasks("reasoning_gym/base_conversion", n=100).rows["entry"])
    for name in UNSEEDED: assert adapter_tasks(f"reasoning_gym/{name}", n=3).rows["entry"] == adapter_tasks(f"reasoning_gym/{name}", n=3).rows["entry"]


def test_code_in_an_answer_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for name in sorted(gym._LITERALS | gym._FORMULAS):
        row = adapter_tasks(f"reasoning_gym/{name}", n=1).rows[0]
        for text in (code, "9**9**9**9", "exit()"):
            assert gym.reasoning_gym_reward([says(f"<answer>{text}</answer>")], [name], ["{}"], [row["entry"]])[0] <= 0.05
    assert not mark.exists()
    dataset = reasoning_gym.create_dataset("binary_matrix", seed=0, size=1)
    dataset.score_answer(code, dataset[0])
    assert mark.exists()   # the package alone runs it


def test_options_reach_the_dataset_and_its_score():
    rows = adapter_tasks("reasoning_gym/chain_sum+leg_counting", n=5).rows
    assert rows["dataset"] == ["chain_sum", "leg_counting"] * 2 + ["chain_sum"] and len({*rows["entry"]}) == 5
    row = adapter_tasks("reasoning_gym/chain_sum", n=1, min_terms=9, max_terms=9).rows[0]
    assert json.loads(row["config"]) == {"min_terms": 9, "max_terms": 9} and row["prompt"][-1]["content"].count(" + ") + row["prompt"][-1]["content"].count(" - ") == 8


@pytest.mark.parametrize("name, options, message", [
    ("reasoning_gym/chain_sums", {}, "nearest is chain_sum"), ("reasoning_gym/composite", {}, "chain_sum\\+leg_counting"), ("reasoning_gym/chain_sum", {"terms": 3}, "does not take"),
    ("reasoning_gym/chain_sum", {"min_terms": 0}, "does not take"), ("reasoning_gym/chain_sum", {"split": "dev"}, "train and test"), ("reasoning_gym/chain_sum", {"n": 0}, "n must be"),
    ("textarena/TicTacToe-v0", {}, "no game of one player"), ("textarena/PublicGoodsGame-v0", {}, "no game of one player"), ("textarena/Hangman-v0", {}, "nltk.downloader words"),
    ("textarena/TwentyQuestions-v0", {}, "OpenRouter"), ("textarena/BabyAiText-v0", {}, "misses a part"), ("textarena/Sudoko-v0", {}, "nearest is Sudoku-v0"),
    ("textarena/Sudoku-v0", {"action": "x"}, "reply or tool"), ("textarena/Sudoku-v0", {"clues": 3}, "takes no option clues"), ("textarena/Sudoku-v0", {"split": "dev"}, "train and test"),
    ("textarena/Sudoku-v0", {"n": -1}, "n must be")])
def test_bad_input_in_one_sentence(name, options, message, monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(ValueError, match=message) as e: adapter_tasks(name, **{"n": 1} | options)
    assert "\n" not in str(e.value)


# TextArena

def hanoi(n, a="A", b="B", c="C"): return hanoi(n - 1, a, c, b) + [f"[{a} {c}]"] + hanoi(n - 1, b, a, c) if n else []


def lights(game):
    "Presses that put all lights out, by elimination over two elements."
    size, grid = game.size, game.state.game_state["grid"]
    near = lambda r, c: [(r + a, c + b) for a, b in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)) if 0 <= r + a < size and 0 <= c + b < size]
    cells = [(r, c) for r in range(size) for c in range(size)]
    rows = [sum(1 << cells.index(x) for x in near(*cell)) | (int(grid[cell[0]][cell[1]]) << 25) for cell in cells]
    for k in range(25):
        pivot = next((i for i in range(len(rows)) if rows[i] >> k & 1 and all(not rows[i] >> j & 1 for j in range(k))), None)
        if pivot is None: continue
        row = rows.pop(pivot)
        rows = [r ^ row if r >> k & 1 else r for r in rows] + [row]
    return [f"[{cells[k][0]} {cells[k][1]}]" for k in range(25) for r in rows if r & (1 << 25) - 1 and (r & -r) == 1 << k and r >> 25]


def frozen(game):
    state = game.state.game_state
    grid, start, goal = state["grid"], tuple(state["player_pos"]), tuple(state["goal_pos"])
    seen, queue = {start: []}, deque([start])
    while queue:
        r, c = queue.popleft()
        for name, (a, b) in game.actions.items():
            to = (r + a, c + b)
            if 0 <= to[0] < game.size and 0 <= to[1] < game.size and grid[to[0]][to[1]] != "H" and to not in seen:
                seen[to] = seen[r, c] + [f"[{name}]"]
                queue.append(to)
    return seen[goal]


def sudoku(game): return [f"[{r + 1} {c + 1} {game.full_grid[r][c]}]" for r in range(9) for c in range(9) if not game.state.game_state["board"][r][c]]
def secretary(game):
    draws = game.state.game_state["draws"]
    return ["[continue]"] * draws.index(max(draws)) + ["[accept]"] * (draws.index(max(draws)) < len(draws) - 1)


GOLD = {"TowerOfHanoi-v0": lambda g: hanoi(3), "TowerOfHanoi-v0-hard": lambda g: hanoi(5), "Sudoku-v0-easy": sudoku, "FrozenLake-v0": frozen, "FrozenLake-v0-hardcore": frozen,
        "GuessTheNumber-v0": lambda g: [f"[{g.game_number}]"], "Mastermind-v0": lambda g: [f"[{' '.join(map(str, g.state.game_state['secret_code']))}]"], "Secretary-v0": secretary, "LightsOut-v0": lights}


def bare(name, seed):
    "The game without any of tirlab's code."
    game = textarena.make(name)
    game.reset(num_players=1, seed=seed)
    while isinstance(game, textarena.Wrapper): game = game.env
    return game


def alone(name, seed, moves):
    "What a game says of moves without any of tirlab's code."
    game = textarena.make(name)
    game.reset(num_players=1, seed=seed)
    done = any(game.step(m)[0] for m in moves)
    return done, (game.close()[0] or {}).get(0, 0.0) if done else 0.0


def rolled(row, kind, moves, limits=RolloutLimits(completion_tokens=2**18, observation_chars=None)):
    "Rollouts of a policy that makes these moves."
    made = []
    def factory():
        made.append(kind())
        return made[-1]
    turns = [{"content": m} if kind is TextArenaEnvironment else {"name": "act", "arguments": {"text": m}} for m in moves]
    last = turns.pop()["content"] if kind is TextArenaEnvironment else "Done."
    t = demonstrate([dict(row) | {"ground_truth": list(map(json.dumps, turns)), "answer": last}], TOK, factory, limits=limits)[0]
    return t, made[0].get_reward(), made[0]


@pytest.mark.parametrize("name", GOLD)
@pytest.mark.parametrize("kind", [TextArenaEnvironment, TextArenaTool])
def test_solved_games_earn_what_the_game_gives(name, kind):
    for seed in (0, 1):
        moves = GOLD[name](bare(name, seed))
        for some in (moves, moves[:-1] or ["nonsense"], [*moves[:1], "nonsense", "nonsense"] if len(moves) > 1 else ["nonsense"] * 2):
            row = dict(prompt=[{"role": "user", "content": "Play."}], game=name, seed=seed)
            t, reward, game = rolled(row, kind, some)
            done, theirs = alone(name, seed, some)
            assert (game._done, reward) == (done, theirs), (name, seed, some)
            if some is moves: assert done and reward == 1.0
            over = StopReason.DONE if kind is TextArenaTool else StopReason.ANSWER
            assert t.stop is (over if done else StopReason.ANSWER if kind is TextArenaTool else StopReason.FAILED)   # failed: the script has no more moves


def playable():
    return [n for n in ENV_REGISTRY if not n.endswith(("-train", "-raw")) and not n.startswith(("Sokoban-v0-medium", "SpellingBee"))]


def test_every_game_of_one_player_begins_plays_and_ends():
    played, refused = {}, {}
    for name in playable():
        try: rows = adapter_tasks(f"textarena/{name}", n=1).rows
        except ValueError as e: refused[name] = str(e); continue
        environment = TextArenaEnvironment()
        environment.reset(**rows[0])
        assert rows[0]["prompt"][0]["content"].strip()
        for _ in range(3):
            if environment._done: break
            environment._reply("this is no move")
        played[name] = environment.get_reward()
    assert len(played) >= 56 and all(isinstance(r, float) for r in played.values()) and all("\n" not in r and r.startswith("textarena/") for r in refused.values())
    assert {"2048-v0", "Sudoku-v0", "Minesweeper-v0", "Sokoban-v0", "Blackjack-v0", "Crosswords-v0"} <= set(played) and {"TicTacToe-v0", "Wordle-v0", "Debate-v0"} <= set(refused)


def test_games_at_once_do_not_disturb_each_other_nor_anybody_else():
    moves = ["[up]", "[left]", "[down]", "[right]"] * 6
    random.seed(7)
    outside = random.getstate()
    def play(seed, out):
        e = TextArenaEnvironment()
        e.reset("2048-v0", seed)
        out.append([e._move(m) for m in moves if not e._done])
    single = [[], []]
    for seed in (0, 1): play(seed, single[seed])
    many = [[] for _ in range(8)]
    threads = [threading.Thread(target=play, args=(i % 2, many[i])) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(many[i] == single[i % 2] for i in range(8)) and single[0] != single[1] and random.getstate() == outside


def test_a_row_begins_as_it_was_made():
    row = adapter_tasks("textarena/Minesweeper-v0-small", n=1, split="test", seed=2).rows[0]
    environment = TextArenaEnvironment()
    environment.reset(**row)
    with pytest.raises(ValueError, match="begins otherwise"): environment.reset(**row | {"first": "another"})
    seeds = {(s, seed): set(adapter_tasks("textarena/Minesweeper-v0-small", split=s, n=3, seed=seed).rows["seed"]) for s in ("train", "test") for seed in (0, 1)}
    assert not any(seeds[a] & seeds[b] for a in seeds for b in seeds if a != b)


def test_a_game_that_its_move_breaks_is_over(monkeypatch):
    environment = TextArenaTool()
    environment.reset("TowerOfHanoi-v0")
    monkeypatch.setattr(type(environment._game), "step", lambda self, action: 1 / 0)
    assert "the game failed: ZeroDivisionError" in environment.act("[A C]") and environment.get_reward() == 0 and environment._over([])
    with pytest.raises(ValueError, match="over"): environment.act("[A C]")


def test_a_game_in_tokens():
    row = adapter_tasks("textarena/GuessTheNumber-v0", n=1).rows[0]
    prompt, tools, format, environment, _ = open_row(dict(row), TOK, TextArenaTool)
    assert list(tools) == ["act"] and "Guess The Number" in TOK.decode(prompt) and "act(text)" in TOK.decode(prompt)
    assert list(open_row(dict(row), TOK, TextArenaEnvironment)[1]) == []
    assert observed(begin("GuessTheNumber-v0", row["seed"], SimpleNamespace(_random=None))) == row["first"] == row["prompt"][0]["content"]


# Training and evaluation

@pytest.mark.parametrize("name, options", [("reasoning_gym/chain_sum", {"max_terms": 2, "max_digits": 1}), ("textarena/GuessTheNumber-v0", {}), ("textarena/GuessTheNumber-v0", {"action": "tool"})])
def test_training_and_evaluation(name, options, tmp_path):
    from tirlab.config.tir_config import TIRConfig
    from tirlab.trainer.trainer import TIRTrainer
    found = adapter_tasks(name, n=4, **options)
    args = TIRConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, max_completion_length=96, report_to=[], save_strategy="no", seed=0, logging_steps=1)
    trainer = TIRTrainer(model=tiny_policy(), reward_funcs=found.rewards or None, args=args, train_dataset=found.rows, environment_factory=found.environment, processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 2 and any("reward" in line for line in trainer.state.log_history)
    done = evaluate(trainer.model, trainer.processing_class, found.rows, found.environment, found.rewards or None, limits=RolloutLimits(completion_tokens=96))
    assert len(done.rewards) == 4 and all(r is None or r <= 1 for r in done.rewards) and any(r is not None for r in done.rewards)
