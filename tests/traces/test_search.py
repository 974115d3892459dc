"""Search in the whole text of a run: every place, and no other; while files are read, not after; by the command line, too."""
import json
import re

import pytest
from trace_rows import make_row, make_run

from tirlab.cli import main as cli
from tirlab.traces.run import RunError, RunWriter, TraceRow, open_run, trace_id
from tirlab.traces.search import find, search, search_parts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Three steps of twenty trajectories: three row groups a file."
    make_run(path := tmp_path_factory.mktemp("search") / "run", steps=3, per_step=20)
    run = open_run(path)
    run.rows = {name: run.trajectory(name) for name in run.index().id}
    return run


def places(run, pattern, where="any", flags=re.IGNORECASE):
    "What a search must find, by Python: each run of tokens of one turn and one writer, and the prompt."
    found = set()
    for name, row in run.rows.items():
        texts = {}
        for j, wrote, text in zip(row.turn.tolist(), row.mask.tolist(), row.text): texts[j, wrote] = texts.get((j, wrote), "") + text
        texts = {(j, "model" if wrote else "observation"): t for (j, wrote), t in texts.items()} | {(None, "prompt"): "".join(row.prompt_text)}
        found |= {(name, turn, whose) for (turn, whose), t in texts.items() if where in ("any", whose) and re.search(pattern, t, flags)}
    return found


@pytest.mark.parametrize("text, options", [("syntaxerror", {}), ("sum", dict(where="model")), ("(", dict(where="prompt")), ("python", dict(where="observation")), ("Sum", dict(case=True)),
                                           (r"answer: \d+<", dict(regex=True)), (r"\A<tool_call>|× \d+ =", dict(regex=True)), (r"\n{2}|solve|^$", dict(regex=True)), (".", {})])
def test_every_place_and_no_other(run, text, options):
    found = list(search(run, text, **options))
    pattern = text if options.get("regex") else re.escape(text)
    assert {(h.id, h.turn, h.where) for h in found} == places(run, pattern, options.get("where", "any"), 0 if options.get("case") else re.IGNORECASE)
    assert len({(h.id, h.turn, h.where) for h in found}) == len(found) and [h.step for h in found] == sorted((h.step for h in found), reverse=True)
    for h in found:
        row = run.rows[h.id]
        pieces = row.prompt_text if h.where == "prompt" else row.text[h.token:]
        assert re.search(pattern, "".join(pieces), re.IGNORECASE) and (h.where == "prompt" or row.turn[h.token] == h.turn) and (h.reward, h.step) == (row.reward, row.step)


def test_rows_of_the_index_say_what_is_read(run):
    some = find(run.index(), steps=(2, 2)).iloc[[3, 19, 8]]
    assert {h.id for h in search(run, "what is", rows=some)} == set(some.id)
    assert list(search(run, "what is", rows=some.iloc[:0])) == []


def test_places_are_known_before_the_last_file_is_read(tmp_path):
    make_run(tmp_path / "run", steps=3)
    found = search(open_run(tmp_path / "run"), "what is")
    for file in (tmp_path / "run/tokens").glob("step-00000[12]*"): file.unlink()
    assert next(found).step == 3 and len(list(found)) == 7
    parts = list(search_parts(open_run(tmp_path / "run"), "what is"))
    assert [p.unreadable for p in parts] == [None, "step-000002.rank-0.parquet", "step-000001.rank-0.parquet"] and sum(p.trajectories for p in parts) == 24


def test_odd_text(tmp_path):
    "Empty pieces, no tokens, other alphabets, what a terminal would obey, and an expression's own signs as text."
    writer = RunWriter(tmp_path / "run", {})
    rows = [TraceRow(id=trace_id(1, 0, 0), step=1, ids=[], text=[], mask=[], turn=[]),
            TraceRow(id=trace_id(1, 0, 1), step=1, ids=[1, 2, 3, 4], text=["", "Größe ", "", "日本\x1b[2J a+b\\E"], mask=[1, 1, 1, 1], turn=[0, 0, 0, 0], prompt_text=["?"], prompt_ids=[1])]
    writer.append_index(writer.write_tokens(1, rows))
    run = open_run(tmp_path / "run")
    place = lambda text, **options: [(h.id[-1], h.token, h.match) for h in search(run, text, **options)]
    assert place("GRÖSSE") == [] and place("größe") == [("1", 1, "Größe")] and place("本") == [("1", 3, "本")] and place("a+b\\E") == [("1", 3, "a+b\\E")]
    assert place("\x1b[2J") == [("1", 3, "\x1b[2J")] and place("größe 日") == [("1", 1, "Größe 日")] and place("?", where="prompt") == [("1", 0, "?")]


@pytest.mark.parametrize("options, error, says", [(dict(text="(", regex=True), ValueError, "no regular expression"), (dict(text=""), ValueError, "no text"), (dict(text="x", where="tool"), ValueError, "where='tool'")])
def test_bad_input(run, options, error, says):
    with pytest.raises(error, match=re.escape(says)): search(run, **options)


def test_a_run_without_trajectories(tmp_path):
    RunWriter(tmp_path / "run", {})
    with pytest.raises(RunError, match="no trajectories to search"): search(open_run(tmp_path / "run"), "x")


# ---- by the command line

def test_the_command_line_finds_and_says_so(run, capsys):
    assert cli.main(["trace", "find", str(run.path), "syntaxerror"]) == 0
    out, told = capsys.readouterr()
    assert len(out.splitlines()) == len(list(search(run, "syntaxerror"))) and "turn 1 observation" in out and f"tirlab trace show {run.path} ID" in told
    assert cli.main(["trace", "find", str(run.path), r"answer: \d", "--regex", "--where", "model", "--limit", "2", "--json"]) == 0
    lines, told = capsys.readouterr()
    hits = [json.loads(line) for line in lines.splitlines()]
    assert len(hits) == 2 and hits[0]["where"] == "model" and hits[0]["step"] == 3 and re.match(r"answer: \d", hits[0]["match"], re.I) and "--limit" in told
    assert cli.main(["trace", "find", str(run.path), "nowhere at all"]) == 1 and "0 places" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [(["RUN", "(", "--regex"], "no regular expression"), (["EMPTY", "x"], "no trajectories to search"), (["/nowhere", "x"], "There is no run folder"), (["RUN", ""], "no text")])
def test_bad_words_are_one_sentence(run, tmp_path, words, says, capsys):
    RunWriter(tmp_path / "empty", {})
    assert cli.main(["trace", "find", *({"RUN": str(run.path), "EMPTY": str(tmp_path / "empty")}.get(w, w) for w in words)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and says in err[0]


def test_scores_of_a_folder_that_is_not_there(run, capsys):
    assert cli.main(["trace", "score", str(run.path), "--model", "/nope"]) == 2
    assert "model=/nope: there is no such folder" in capsys.readouterr().err


def test_a_row_in_a_cell_is_twenty_lines(run):
    long = make_row(1, 0, text=["x "] * 300, ids=range(300), mask=[1] * 300, turn=[i // 3 for i in range(300)], turn_kinds=["response"] * 100, logprob=None, entropy=None, sampling_logprob=None, advantage=None)
    shown = repr(long).splitlines()
    assert len(shown) <= 20 and "more turns" in shown[-2] and shown[-1].lstrip().startswith("100 ")
