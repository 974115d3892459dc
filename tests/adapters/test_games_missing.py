"""Games, procedural tasks and tau2 where their packages are not installed: one sentence with the line that installs them."""

import sys

import pytest

from tirlab.adapters import tau2_data
from tirlab.adapters.reasoning_gym import harmless, read_entry, write_entry
from tirlab.adapters.task_set import ADAPTERS, adapter_tasks
from tirlab.adapters.tau2 import named_calls, tau2_environment
from tirlab.adapters.tau2_data import SharedRows
from tirlab.rollout.endpoint import Endpoint


@pytest.mark.parametrize("name, package", [("textarena/Sudoku-v0", "textarena"), ("reasoning_gym/chain_sum", "reasoning_gym"), ("tau2/airline", "tau2")])
def test_a_missing_package_names_the_line_that_installs_it(name, package, monkeypatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]: monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    tau2_data.tau2_module.cache_clear()
    with pytest.raises(ValueError) as e: adapter_tasks(name, n=1)
    assert ADAPTERS[name.partition("/")[0]].install in str(e.value) and "\n" not in str(e.value)


def test_a_row_that_is_read_is_a_copy():
    base = {"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}}
    rows = SharedRows(base)
    rows["a"]["n"] = 7
    for row in rows.values(): row["seen"] = True
    assert rows.get("x", 0) == 0 and rows.get("b")["seen"] and base == {"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 3}}
    other = SharedRows(base)
    other.get("b"), dict(other.items())
    assert other.changes() == {} and other.pop("c") == {"n": 3} and other.changes() == {"c": None}
    del other["a"]
    other["d"] = {"n": 4}
    assert other.changes() == {"a": None, "c": None, "d": {"n": 4}} and other.pop("x", 5) == 5


@pytest.mark.parametrize("text, calls", [
    ("run reset() and reset ()", [("reset", {})]), ("set(mode='4g', n=1)", [("set", {"mode": "4g", "n": 1})]), ("set('4g')", [("set", None)]), ("set(mode=exit)", [("set", None)]),
    ("preset() unset_reset()", []), ("set(a=[1, {'b': None}])", [("set", {"a": [1, {"b": None}]})]), ("set(" * 2000, []), ("", []), ("set(**{1: 2})", None)])
def test_calls_that_a_message_names(text, calls):
    found = named_calls(text, ["set", "reset"])
    assert found == calls if calls is not None else all(name == "set" for name, _ in found)
    assert named_calls(text, []) == []


def test_entries_keep_their_types():
    entry = {"answer": "1", "metadata": {"t": (1, (2, [3, ()])), "d": {1: {"a": (1,)}, (2, 3): None}, "plain": {"x": [1.5, True, None]}}}
    assert read_entry(write_entry(entry, "x")) == entry
    for bad in ({"answer": object()}, {"answer": {1, 2}}, {"answer": {"__tuple__": [1]}}):
        with pytest.raises(ValueError, match="reasoning_gym/x"): write_entry(bad, "x")


@pytest.mark.parametrize("answer", ["exit()", "__import__('os').system('true')", "9**9**9", "9^9^9", "2**(3**400)", "x.__class__", "(lambda: 1)()", "[x for x in y]", "10**101", "f(1)", "abs(1)", "'a'*9",
                                    "1 if x else 2", "1 << 10**9", "9" * 14, "x" * 2000, "(" * 500, "", "eval(x)", "sin(exit())", "{}", "x:=1", "factorial(10**6)", "\0"])
def test_formulas_that_are_not_evaluated(answer): assert harmless("countdown", answer) == "("


@pytest.mark.parametrize("answer", ["3 + 4*(5-2)/7", "x**3/3 - cos(2*x) + C", "-5*x**2 + 3*x*y", "exp(-x)*sin(x)/2", "(x + 1)^2", "sqrt(2)", "log(x)**2"])
def test_formulas_that_are_evaluated(answer): assert harmless("simple_integration", answer) == answer and harmless("gcd", "exit()") == "exit()"


@pytest.mark.parametrize("answer", ["print(1)", "[1]*10**9", "[].append(1)", "exit ()", "{**a}", "a.b", "f'{1}'", "x=1", "1<<9", "[" * 30_000])
def test_literals_that_are_not_evaluated(answer): assert harmless("n_queens", answer) == "("


def test_a_user_needs_a_model_and_an_address():
    with pytest.raises(ValueError, match="user_model"): tau2_environment("http://localhost:1/v1")
    with pytest.raises(ValueError, match="whole address"): tau2_environment("localhost", "m")
    kind = tau2_environment(Endpoint("http://localhost:1/v1", "m"))
    assert kind.__name__ == "Tau2Environment" and kind._endpoint.model == "m" and tau2_environment()._endpoint is None
