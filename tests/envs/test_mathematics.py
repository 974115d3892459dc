"""Problems of mathematics: every shape of file, what is refused, and an evaluation of them."""
import json

import pandas as pd
import pytest

from tirlab.envs import math_tasks as mathematics
from tirlab.eval.sources import task_source
from tirlab.envs.math_tasks import BOXED, math_row, math_tasks, reference_answer
from tirlab.rewards.outcome import math_reward

ROWS = [
    ({"question": "How many?", "answer": "so 3*4=<<3*4=12>>12\n#### 12"}, "12"), ({"question": "?", "answer": "#### 1,234,567"}, "1234567"),
    ({"problem": "?", "solution": "first \\boxed{1}, then \\boxed{\\frac{a}{\\sqrt{2}}}"}, "\\frac{a}{\\sqrt{2}}"),
    ({"problem": "?", "solution": "\\boxed{3}", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}, "\\left( 3, \\frac{\\pi}{2} \\right)"),
    ({"ID": "2024-I-1", "Problem": "?", "Answer": 33}, "33"), ({"question": "?", "answer": 27.0}, "27"), ({"question": "?", "answer": 0}, "0"), ({"question": "?", "answer": "$x^2$"}, "x^2"),
    ({"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": ["7"]}}, "7"), ({"problem": "?", "answer": "(1,234)"}, "(1,234)"),
]


@pytest.mark.parametrize("row,answer", ROWS, ids=range(len(ROWS)))
def test_answers_are_found(row, answer):
    assert reference_answer(row) == answer and math_row(row)["answer"] == answer


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_files_of_every_kind(tmp_path, suffix):
    rows, path = [{"problem": f"{i}+1?", "answer": str(i + 1), "level": None if i else "easy"} for i in range(3)], tmp_path / f"set.{suffix}"
    if suffix == "jsonl": path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif suffix == "json": path.write_text(json.dumps(rows))
    else: getattr(pd.DataFrame(rows), f"to_{suffix}")(path, index=False)
    found = math_tasks(str(path), n=2)
    assert found["answer"] == ["1", "2"] and found["task"] == ["set/0", "set/1"] and set(found["environment"]) == {"python"} and found["level"] == ["easy", None]
    assert found[0]["prompt"] == [{"role": "system", "content": BOXED}, {"role": "user", "content": "0+1?"}]


def test_nested_parquet(tmp_path):
    pd.DataFrame([{"prompt": [{"role": "user", "content": "6*7?"}], "reward_model": {"ground_truth": "42", "style": "rule"}}]).to_parquet(tmp_path / "verl.parquet")
    (row,) = math_tasks(str(tmp_path / "verl.parquet"), instruction=None)
    assert row["answer"] == "42" and row["prompt"] == [{"role": "user", "content": "6*7?"}]


@pytest.mark.parametrize("text,said", [
    ('{"problem": "?"}', "Row 0 has no answer"), ('{"problem": "?", "solution": "see above"}', "Row 0 has no answer"), ('{"problem": "?", "answer": null}', "Row 0 has no answer"),
    ('{"answer": "1"}', "Row 0 has no problem"), ("{", "line 1 is no JSON object"), ("[1]", "line 1 is no JSON object"), ("", "holds no problems"),
])
def test_what_cannot_be_a_task_is_refused(tmp_path, text, said):
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said): math_tasks(str(path))


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(ValueError, match="There is no file"): math_tasks(str(tmp_path / "no.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="cannot be read"): math_tasks(str(tmp_path / "bad.parquet"))


def test_the_hub_is_asked_by_its_names_and_failure_is_a_sentence(monkeypatch):
    asked = []
    def load(where, config, split):
        asked.append((where, config, split))
        if where == "nobody/nothing": raise ConnectionError("no route\nto host")
        return [{"question": "1+1?", "answer": "#### 2"}]
    monkeypatch.setattr(mathematics, "load_dataset", load)
    found = task_source("gsm8k", n=1)
    assert asked == [("openai/gsm8k", "main", "test")] and found.rows["answer"] == ["2"] and found.rewards == [math_reward]
    with pytest.raises(ValueError, match=r"nobody/nothing could not be loaded \(ConnectionError: no route to host\).*local file"): task_source("nobody/nothing")


def test_math_verify_scores_them():
    rows = [math_row(r) for r, _ in ROWS[:3]]
    said = ["It is \\boxed{12.0}.", "\\boxed{1234568}", "\\boxed{\\frac{a\\sqrt{2}}{2}}"]
    assert math_reward([[{"role": "assistant", "content": s}] for s in said], answer=[r["answer"] for r in rows]) == [1, 0, 1]


AS_THEY_STAND = ["007", "12345678901234567", "True", "NA", "null", "1e5", "0.10", "-0", "1/2", "None", "nan", "inf", "2024-01-02", "+5", "é"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "csv of a spreadsheet"])
def test_answers_of_a_file_stay_as_they_stand(tmp_path, suffix):
    rows, path = [{"problem": f"{i}?", "answer": a, "level": ""} for i, a in enumerate(AS_THEY_STAND)], tmp_path / f"set.{suffix.split()[0]}"
    if suffix == "jsonl": path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    elif suffix == "json": path.write_text(json.dumps(rows))
    elif suffix == "parquet": pd.DataFrame(rows).to_parquet(path, index=False)
    elif suffix == "csv": path.write_text("problem,answer,level\n" + "".join(f"{r['problem']},{r['answer']},\n" for r in rows))
    else: path.write_bytes(("problem,answer,level\r\n" + "".join(f"\"{r['problem']}\",\"{r['answer']}\",\r\n" for r in rows)).encode("utf-8-sig"))
    found = task_source(str(path))
    assert found.rows["answer"] == AS_THEY_STAND and set(found.rows["level"]) == {None} and found.rewards == [math_reward]
    path.write_text("problem,answer\n?,\n") if suffix.startswith("csv") else None
    if suffix.startswith("csv"):
        with pytest.raises(ValueError, match="Row 0 has no answer"): math_tasks(str(path))


@pytest.mark.parametrize("written,answer", [("12345678901234567890", "12345678901234567890"), ("1e5", "1e5"), ("0.10", "0.10"), ("27.0", "27"), ("3.141592653589793238462643", "3.141592653589793238462643"), ("-7", "-7")])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_numbers_of_a_file_keep_their_spelling(tmp_path, suffix, written, answer):
    line, path = '{"problem": "?", "answer": %s, "level": 3, "id": 1.50}' % written, tmp_path / f"set.{suffix}"
    path.write_text(f"[{line}]" if suffix == "json" else line)
    row = math_tasks(str(path))[0]
    assert (row["answer"], row["level"], row["task"]) == (answer, "3", "1.50")


def test_integers_beside_missing_ones_are_not_rounded(tmp_path):
    pd.DataFrame({"problem": ["a?", "b?"], "answer": ["1", "2"], "id": pd.array([12345678901234567, None], "Int64")}).to_parquet(tmp_path / "set.parquet")
    assert math_tasks(str(tmp_path / "set.parquet"))["task"] == ["12345678901234567", "set/1"]
