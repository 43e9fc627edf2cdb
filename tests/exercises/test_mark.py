"""The marking command: one student's fault marks that student's row alone."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mark
from test_exercises import HERE
from wrong import WRONG

def imported(names):
    """A student's file that answers with functions of right.py and wrong.py: {exercise: function's name}"""
    lines = ["import sys", f"sys.path.insert(0, {str(HERE)!r})", "import right", "import wrong"]
    for exercise, name in names.items():
        module = "wrong" if name in [f.__name__ for f in WRONG[exercise]] else "right"
        lines.append(f"{exercise} = {module}.{name}")
    return "\n".join(lines) + "\n"

RIGHT = imported({exercise: exercise for exercise in WRONG})
FILES = {
    "all right.py": RIGHT,
    "Gruppe B/Jörg Müller.py": imported({exercise: f[0].__name__ for exercise, f in WRONG.items()}),
    "nothing done.py": (HERE / "exercises.py").read_text(),
    "syntax.py": "def omega(n:\n",
    "leaves.py": "import sys\nsys.exit(0)\n",
    "loop.py": RIGHT + "def omega(n, n_warm):\n    while True:\n        print('x' * 10000)\n",
    "raises.py": RIGHT + "del project\ndef guidance(u, cfg):\n    return uu\ndef flow_step(*all):\n    sys.exit(1)\n",
}

def marks_of(folder, tmp_path, *flags):
    """Run the command on a folder -> {file: {exercise: cell}}, what it printed"""
    command = [sys.executable, str(HERE / "mark.py"), str(folder), "--csv", str(tmp_path / "marks.csv"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "180"})
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "marks.csv", encoding="utf-8-sig", newline="") as file:
        return {row["file"]: row for row in csv.DictReader(file)}, done.stdout

@pytest.mark.skipif("ANSWERS" in os.environ, reason="the marking command, which is no exercise; it takes a minute")
def test_a_class_of_accidents(tmp_path):
    folder = tmp_path / "a class"
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    rows, printed = marks_of(folder, tmp_path, "--workers", "2", "--seconds", "30")
    assert len(rows) == len(FILES) and all(name in printed for name in rows)
    assert {name: int(row["total"]) for name, row in rows.items()} == {
        "all right.py": 8, str(Path("Gruppe B/Jörg Müller.py")): 0, "nothing done.py": 0, "syntax.py": 0,
        "leaves.py": 0, "loop.py": 7, "raises.py": 5}
    for exercise in mark.EXERCISES:
        assert rows[str(Path("Gruppe B/Jörg Müller.py"))][exercise].startswith("wrong: "), exercise
        assert rows["nothing done.py"][exercise] == "not done"
        assert rows["syntax.py"][exercise] == "error: SyntaxError: '(' was never closed"
        assert rows["leaves.py"][exercise] == "error: the file ended the process (exit code 0)"
    assert rows["loop.py"]["omega"] == "error: no answer within 30 seconds"
    assert rows["raises.py"]["project"] == "not done: the file has no function of this name"
    assert rows["raises.py"]["guidance"] == "error: NameError: name 'uu' is not defined"
    assert rows["raises.py"]["flow_step"] == "error: SystemExit: 1"
    assert "1 x the whole file, error: SyntaxError: '(' was never closed (syntax.py)" in printed

def test_every_exercise_has_its_column():
    assert [*mark.EXERCISES] == [*WRONG]

def test_a_cell_is_cut_between_words():
    why = "omega(0) should be 0: at the first step the detail loss has no say; got 0.5 instead of 0"
    assert mark.cell("wrong", why, 24) == "wrong: omega(0) should"
    assert mark.cell("right", "", 24) == "right"
    assert mark.lesson(why) == "omega(0) should be 0: at the first step the detail loss has no say"

def test_an_empty_folder_is_refused(tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "mark.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "no .py file in it" in done.stderr and len(done.stderr.splitlines()) == 1
