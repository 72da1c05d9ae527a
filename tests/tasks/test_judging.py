"""Right answers in other clothes: numbers compared as numbers, programs found in any wrapping."""

import warnings

import pytest

from tasks.gsm8k import evaluate_answer, final_number
from tasks.humaneval import program
from tasks.programs import assembled, find_program, prelude


def asked(answer):
    return {"messages": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


THOUSAND = [
    "#### 1018", "#### 1018.", "#### $1018", "#### 1018.0", "#### **1018**", "#### 1,018", "#### 1,018.00", "####1018",
    "####   1018", "##### 1018", "**#### 1018**", "#### $1,018.", "#### 1018 apples", "#### 1018km", "#### 1018%",
    "#### `1018`", "#### _1018_", "#### (1018)", "#### +1018", "#### = 1018", "#### Answer: 1018", "#### €1018",
    "#### The final answer is 1018.", "#### $\\boxed{1018}$", "#### \\(1018\\)", "#### \\$1{,}018", "#### 1\\,018",
    "#### US$1018", "#### USD 1018", "#### Rs. 1018", "#### 1_018", "#### 1'018", "#### 1 018", "#### 1\u00a0018",
    "#### 1\u202f018 €", "#### 1.018e3", "#### １０１８", "#### \"1018\"", "#### 2036/2", "#### 1018/1", "####\n1018",
    "#### **\n**1018**", "so 5 + 5\n#### 1018\n\n#### 7", "#### unknown\n#### 1018", "#### 1018, since 2 + 2 = 4",
    "#### -> 1018", "####: 1018", "#### So the total is 1018.", "#### 1018/-", "#### 1018 (one thousand eighteen)",
    "#### ~1018", "#### ≈ 1018", "#### [1018]", "#### 01018", "####\t1018", "#### **$1,018.00**", "#### 1018\r\n",
]  # fmt: skip


@pytest.mark.parametrize("completion", THOUSAND)
def test_numbers_are_compared_as_numbers(completion):
    assert evaluate_answer(asked("2 * 509 = 1018\n#### 1,018"), completion) is True


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("#### -7", ["#### -7", "#### -7.0", "#### −7", "#### -$7", "#### $-7", "#### **-7**", "#### - 7"],
         ["#### 7", "#### --7"]),
        ("#### 3.5", ["#### 3.50", "#### 7/2", "#### 3 1/2", "#### $3.50", "#### \\frac{7}{2}"],
         ["#### 3", "#### 35"]),
        ("#### 0", ["#### 0.00", "#### $0", "#### -0"], ["", "#### none", "####", "#### x", "#### $"]),
        ("#### .5", ["#### 0.5", "#### 1/2"], ["#### 5", "#### 1", "#### 1/0"]),
        ("#### 12", ["#### 12 eggs", "#### 12."], 
         ["12", "### 12", "#### 12.5", "#### 112", "#### 1 2", "#### 13\n#### 12"]),
        ("#### 1018", [], 
         ["#### 1018.5", "#### 10.18", "#### 1,0181", "#### 101 8", "#### 1e999999999", "#### 1018/0"]),
    ],
)  # fmt: skip
def test_other_numbers_are_others(gold, right, wrong):
    assert [evaluate_answer(asked(gold), text) for text in right] == [True] * len(right)
    assert [text for text in wrong if evaluate_answer(asked(gold), text)] == []


def test_without_a_number_nothing_is_right():
    assert final_number("no mark 5") is None and not evaluate_answer(asked("#### x"), "#### x")
    assert not evaluate_answer(asked("#### 10"), "#### 10.0", strict=True)


# --- programs ---------------------------------------------------------------------------------------------------------

CODE = "def total(xs):\n    return sum(xs)"
DOCUMENTED = 'def total(xs):\n    """\n```\ntotal([1])\n```\n    """\n    return sum(xs)'
WRAPPED = [
    CODE,
    f"```python\n{CODE}\n```",
    f"```py\n{CODE}\n```",
    f"```Python\n{CODE}\n```",
    f"```python3\n{CODE}\n```",
    f"``` python\n{CODE}\n```",
    f"```{{.python}}\n{CODE}\n```",
    f'```python title="total.py"\n{CODE}\n```',
    f"```PY\r\n{CODE}\r\n```\r\n".replace("\n", "\r\n").replace("\r\r", "\r"),
    f"~~~python\n{CODE}\n~~~",
    f"````python\n{CODE}\n````",
    f"```python\n{CODE}",  # never closed
    f"```python\n{CODE}\n\nprint(tot",  # cut off
    f"{CODE}\n```",  # the opening fence was the prompt's
    f"```\n```python\n{CODE}\n```\n```",
    f"```python\n```python\n{CODE}\n```",
    f"Sure:\n\n{CODE}\n\nIt adds the numbers up.",
    f"Here it is: ```python\n{CODE}\n```",
    f"1. So:\n   ```python\n   {CODE.replace(chr(10), chr(10) + '   ')}\n   ```",
    f"```js\nlet x = 1;\n```\n```python\n{CODE}\n```",
    f"```\npip install it\n```\n```\n{CODE}\n```",
    f"```python\nprint(total([1, 2]))\n```\n```python\n{CODE}\n```",
    f"```python\n{CODE}\n```\n```python\nassert total([1]) == 2\n```",
    f"```python\ndef total(xs) return\n```\nNo:\n```python\n{CODE}\n```",
    f"```text\n{CODE}\n```",
    f"python\n{CODE}",
    "```python\nZERO = 0\ndef add(a, b):\n    return a + b\n```\n"
    "```python\nfrom functools import reduce\n\ndef total(xs):\n    return reduce(add, xs, ZERO)\n```",
    f'```python\ndef total(xs):\n    """Sum."""\n```\nIn full:\n```python\n{CODE}\n```',  # the question again
    f"<think>def total(xs)?</think>\n```python\n{CODE}\n```",
    "```python\ntotal = lambda xs: sum(xs)\n```",
    f"```python\n{DOCUMENTED}\n```",
    DOCUMENTED,
    f"# The answer\n\n{CODE}\n\n# Why\n\nsum() adds.",
    "from __future__ import annotations\n\n\ndef total(xs: list[int]) -> int:\n    return sum(xs)",
    f"try:\n    import numpy\nexcept ImportError:\n    pass\n\n{CODE}",
    f"```python\nPATTERN = '\\d'\n{CODE}\n```",
    f"    {CODE.replace(chr(10), chr(10) + '    ')}",
    f"{CODE}\n\nif __name__ == '__main__':\n    print(total([1, 2]))",
]
TEST = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n"


def conversation(prompt, name="total", test=TEST):
    return {"messages": [{"role": "user", "content": prompt}], "entry_point": name, "test": test}


def run(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(text, "answer", "exec"), {"__name__": "answer"})


@pytest.mark.parametrize("completion", WRAPPED, ids=range(len(WRAPPED)))
def test_right_programs_pass_in_any_wrapping(completion):
    text = program(conversation('from typing import List\n\n\ndef total(xs):\n    """ Sum. """\n'), completion)
    run(text)


@pytest.mark.parametrize(
    "completion",
    ["", "here you go", "    return sum(xs)", "```python\n    return sum(xs)\n```", "```python\n```", "def total(xs):",
     "def totals(xs):\n    return sum(xs)", f"class Solution:\n    {CODE}",
     "```python\ndef total(xs):\n    return 3\n```"],
)  # fmt: skip
def test_what_is_no_such_function_fails(completion):
    with pytest.raises(Exception):  # noqa: B017 - whatever it is that it does
        run(program(conversation("def total(xs):\n"), completion))


HELPER = "import math\n\nBASE = 10\n\n\ndef square(x):\n    return x * x\n\n\n"


@pytest.mark.parametrize(
    "prompt",
    [
        HELPER + 'def total(xs):\n    """ Sum of squares. """\n',
        HELPER + "def total(xs):\n",
        HELPER + "@property\ndef total(xs):\n    # squares\n",
        HELPER + "async def total(xs):\n    'x'\n",
    ],
)
def test_the_prompt_lends_what_comes_before_its_function(prompt):
    lent = prelude(prompt, "total")
    assert lent is not None and lent.strip() == HELPER.strip()
    test = "def check(candidate):\n    assert candidate([1, 2]) == 15\n"
    text = program(conversation(prompt, test=test), "def total(xs):\n    return sum(map(square, xs)) + BASE")
    run(text)


def test_prompts_that_cannot_be_read_lend_their_imports():
    assert prelude("def f(:\n", "f") is None and prelude("x = 1\n", "f") is None
    text = program(conversation("import math\nWrite a function.\n"), CODE)
    assert text.startswith("import math\n") and CODE in text


def test_several_definitions_and_future_imports():
    two = "```python\ndef f():\n    return 1\n```\n```python\ndef f():\n    return 2\n```"
    assert find_program(two, "f") == "def f():\n    return 1"
    assert find_program("x" * 10_000 + "\ndef g(:\n" * 300, "g") is None
    assert assembled("import a", "from __future__ import annotations\nx = 1").startswith("from __future__ import")
