"""Marks a folder of students' files: a row a file, a column an exercise, and what is wrong, in words.

    python tests/exercises/mark.py FOLDER --workers 4 --csv marks.csv

FOLDER is searched for .py files, in subfolders too. A cell says `right`, `wrong` with the first words of why,
`not done`, or `error` for code that raises, ends or does not come back. Each file runs in a process of its own:
whatever it does, it spoils no other row. That is a fence against accidents, not against malice: the code runs
with your rights, so mark files of strangers in a container.
"""
import csv
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
EXERCISES = ("project", "align_loss", "omega", "flow_loss", "interleave", "flow_step", "guidance",
             "frechet_distance")

# ------------------------------------------------------------ in the student's process
class Reporter:
    """A pytest plugin: runs the tests of some exercises, and writes a line of JSON as each test starts and ends.
    The process may end at any moment; then the last line tells what it was doing."""
    def __init__(self, path, exercises):
        self.file = open(path, "a", encoding="utf-8")
        self.exercises = exercises

    def add(self, **line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if exercise_of(item.name) in self.exercises]

    def pytest_runtest_logstart(self, nodeid):
        self.add(exercise=exercise_of(nodeid.split("::")[-1]), mark="started")

    def pytest_runtest_logreport(self, report):
        exercise = exercise_of(report.nodeid.split("::")[-1])
        if report.skipped:
            self.add(exercise=exercise, mark="not done")
        elif report.when == "call" and report.passed:
            self.add(exercise=exercise, mark="right")

    def pytest_exception_interact(self, node, call, report):
        exercise = exercise_of(node.name)
        said = call.excinfo.exconly().split("\nassert ")[0]             # pytest appends the assertion's source
        if isinstance(node, pytest.Module):                             # the file cannot even be read
            raised = [line[1:].strip() for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            why = raised[-1] if raised else said
            if call.excinfo.errisinstance(SystemExit):                  # an older pytest lives on, a newer does not
                why = f"the file ended the process (exit code {call.excinfo.value.code or 0})"
            self.add(exercise=None, mark="error", why=why)
        elif call.when == "setup":
            self.add(exercise=exercise, mark="not done", why="the file has no function of this name")
        elif call.excinfo.errisinstance(AssertionError):
            self.add(exercise=exercise, mark="wrong", why=said.removeprefix("AssertionError: "))
        else:
            self.add(exercise=exercise, mark="error", why=said)

def exercise_of(test):
    """"test_flow_loss_by_hand" -> "flow_loss" """
    return next((name for name in EXERCISES if test.startswith(f"test_{name}_")), None)

def limit_memory(most=16 * 2**30):
    """Let this process allocate `most` bytes at most, where the system can say so (Windows cannot)."""
    if sys.platform != "win32":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

def child(path, report, exercises, folder):
    """The student's process: the tests of `exercises` on one file, with a report of JSON lines.
    What the file prints goes nowhere, and what it writes goes into `folder`."""
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in 0, 1, 2:
        os.dup2(silence, stream)
    os.chdir(folder)
    os.environ["ANSWERS"] = path                    # test_exercises.py loads it
    os.environ.pop("PYTEST_ADDOPTS", None)          # of the marker's shell: not meant for this
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True                  # no __pycache__ among the students' files
    limit_memory()
    options = ["-q", "-s", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(HERE)]
    pytest.main([*options, str(HERE / "test_exercises.py")], plugins=[Reporter(report, exercises)])

# ------------------------------------------------------------ in the marker's process
def starter():
    """What starts processes: a server that has imported torch once and forks, or, where there is none, anew."""
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["torch", "numpy", "einops", "pytest"])
    return context

def run_once(context, path, exercises, seconds):
    """Run the tests of some exercises on one file -> the lines of its report, how the process ended, in words."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.jsonl")
        process = context.Process(target=child, args=(str(path), str(report), exercises, folder))
        process.start()
        process.join(seconds)
        how = f"no answer within {seconds:g} seconds"
        if process.exitcode is not None:
            how = f"the file ended the process (exit code {process.exitcode})"
        process.kill()
        process.join()
        lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
    return [json.loads(line) for line in lines], how

def mark_file(context, path, seconds):
    """One student's file -> {exercise: (mark, why)}
    An exercise that ends the process is marked, and the others are run again without it."""
    marks = {}
    while len(marks) < len(EXERCISES):
        left = [name for name in EXERCISES if name not in marks]
        lines, how = run_once(context, path, left, seconds)
        found = defaultdict(list)
        for line in lines:
            found[line["exercise"]].append((line["mark"], line.get("why", "")))
        if None in found or not found:                              # it fell, or hung, while it was read
            why = found[None][0][1] if None in found else how
            return marks | {name: ("error", why) for name in left}
        for name, tests in found.items():
            if tests[-1][0] == "started":                           # this one did not come back
                marks[name] = "error", how
            else:
                marks[name] = worst(tests)
    return marks

def worst(tests):
    """The marks of an exercise's tests -> its mark: the first of the worst kind."""
    for kind in "error", "wrong", "not done", "right":
        for mark, why in tests:
            if mark == kind:
                return mark, why
    raise AssertionError(f"no mark among {tests}")

# ------------------------------------------------------------ the table
def lesson(why):
    """What a test says, without the numbers that it got: the same for all who made the same mistake."""
    return re.split(r"; (?:it )?got |\n", why)[0]

def cell(mark, why, width):
    """ "wrong: omega(0) should ..." within `width` letters, cut between words where that leaves any."""
    text = f"{mark}: {lesson(why)}" if why else mark
    if len(text) <= width:
        return text
    cut = text[:width + 1].rsplit(" ", 1)[0]
    return cut if len(cut) > len(mark) + 1 else text[:width]

def table(rows, width):
    """{file: {exercise: (mark, why)}} -> the table as text, `width` letters wide if the names leave room."""
    first = max(len("file"), *(len(name) for name in rows))
    each = max(16, (width - first - 7) // len(EXERCISES) - 2)
    lines = [["file", *EXERCISES, "total"]]
    for name, marks in rows.items():
        total = sum(mark == "right" for mark, _ in marks.values())
        lines.append([name, *(cell(*marks[exercise], each) for exercise in EXERCISES), f"{total} of {len(EXERCISES)}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths)).rstrip() for line in lines)

def reasons(rows):
    """What was wrong, most frequent first: a line a mistake, and who made it."""
    found = defaultdict(list)
    for file, marks in rows.items():
        whole = len(set(marks.values())) == 1                       # a file that cannot be read, for one
        for exercise, (mark, why) in list(marks.items())[:1 if whole else None]:
            if why:
                found["the whole file" if whole else exercise, mark, lesson(why)].append(file)
    lines = []
    for (exercise, mark, why), files in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        who = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        lines.append(f"{len(files):3} x {exercise}, {mark}: {why} ({who})")
    return "\n".join(lines)

def write_csv(path, rows):
    """The table for a spreadsheet, each cell with the whole sentence."""
    with open(path, "w", newline="", encoding="utf-8-sig") as file:     # the mark at the front: for Excel
        writer = csv.writer(file)
        writer.writerow(["file", *EXERCISES, "total"])
        for name, marks in rows.items():
            cells = [f"{mark}: {why}" if why else mark for mark, why in (marks[e] for e in EXERCISES)]
            writer.writerow([name, *cells, sum(mark == "right" for mark, _ in marks.values())])

# ------------------------------------------------------------ the command
def parse_args(argv=None):
    """The command's arguments."""
    p = Parser(__doc__)
    p.add_argument("folder", type=Path, help="Folder of the students' files.")
    p.add_argument("--workers", type=positive_int, default=max(1, (os.cpu_count() or 1) // 2),
                   help="How many files are marked at a time (default: half as many as there are cores).")
    p.add_argument("--seconds", type=positive, default=30,
                   help="How long a file may take, and once more for each exercise that does not come back"
                        " (default 30).")
    p.add_argument("--csv", type=Path, metavar="FILE", help="Write the table to this file too, with whole sentences.")
    return p.parse_args(argv)

def main(args):
    files = sorted(path for path in args.folder.rglob("*.py") if path.is_file())
    if not files:
        raise InputError(f"{args.folder}: no such folder, or no .py file in it; expected the students' files")
    names = [str(path.relative_to(args.folder)) for path in files]
    context = starter()
    with ThreadPoolExecutor(args.workers) as pool:          # a thread waits for each process
        marking = pool.map(lambda path: mark_file(context, path.resolve(), args.seconds), files)
        rows = dict(zip(names, tqdm(marking, total=len(files), desc="files", leave=False)))
    print(table(rows, shutil.get_terminal_size((180, 24)).columns), reasons(rows), sep="\n\n")
    if args.csv:
        write_csv(args.csv, rows)

if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}      # a core a worker
    from vae_expand import InputError, Parser, positive, positive_int, run
    run(main, parse_args())
