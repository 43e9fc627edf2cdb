"""The tests of the exercises, tested: every wrong answer fails with a lesson, every right one passes."""
import inspect

import pytest

import right
import solutions
import test_exercises
from test_exercises import HERE, answer, load
from wrong import WRONG

def questions(name):
    """The tests of an exercise, by name."""
    return {test: f for test, f in vars(test_exercises).items() if test.startswith(f"test_{name}_")}

def lessons(name, function):
    """{test that `function` fails: what it says}"""
    found = {}
    for test, f in questions(name).items():
        try:
            f(function)
        except AssertionError as e:
            found[test] = str(e)
    return found

CASES = [pytest.param(name, f, id=f.__name__) for name, wrong in WRONG.items() for f in wrong]

@pytest.mark.parametrize("name, function", CASES)
def test_wrong_answers_fail_with_a_lesson(name, function):
    found = lessons(name, function)
    assert found, f"{function.__name__} passes all tests of {name}"
    assert all(len(lesson.split()) > 12 for lesson in found.values()), found

def test_right_answers_pass():
    for name in WRONG:
        for answers in solutions, right:
            assert not lessons(name, answer(answers, name))

def test_no_test_is_idle():
    """Two to five tests an exercise, and each fails a wrong answer."""
    for name, wrong in WRONG.items():
        tests = questions(name)
        assert 2 <= len(tests) <= 5 and len(wrong) >= 3
        assert set(tests) == {test for function in wrong for test in lessons(name, function)}, name

def test_the_students_file_has_every_head_and_no_body():
    given = load(HERE / "exercises.py")
    for name in WRONG:
        assert inspect.signature(getattr(given, name)) == inspect.signature(getattr(solutions, name))
        with pytest.raises(pytest.skip.Exception, match="not answered yet"):
            next(iter(questions(name).values()))(answer(given, name))
