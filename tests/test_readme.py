"""The README and its pages say what is: links point where they say, commands parse, counts are right.

    python tests/test_readme.py                 # writes line numbers and counts into these pages anew
"""
import argparse
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import align                                                                                     # noqa: E402
import finetune_dit                                                                              # noqa: E402
import imagenet_eval                                                                             # noqa: E402
import sample                                                                                    # noqa: E402
import vae_expand                                                                                # noqa: E402

SCRIPTS = {f"{module.__name__}.py": module for module in (vae_expand, align, sample, finetune_dit, imagenet_eval)}
README = ROOT / "README.md"
DOCS = [ROOT / name for name in (
    "README.md", "assets/README.md", "assets/QUESTIONS.md", "assets/RUNS.md", "tests/README.md",
    "tests/exercises/README.md", "tests/exercises/LECTURER.md")]
LINKS = re.compile(r"\[([^\]]+)\]\(([^)#]*)#L(\d+)\)")
ROWS = re.compile(r"^(\| \[(\w+\.py)\]\(\w+\.py\) \| )(\d+) \| (\d+)", re.M)

def line_of(name, file, doc=README):
    """Where a script, named as the page `doc` links it, defines a name; from 1."""
    lines = (doc.parent / file).read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", line)]
    assert found, f"{file} defines no {name}"
    return found[0]

def flags_of(module, monkeypatch=None):
    """Every flag of a script and its subcommands."""
    parsers, real = [], vae_expand.Parser.__init__
    vae_expand.Parser.__init__ = lambda self, *a, **k: (parsers.append(self), real(self, *a, **k))[1]
    try:
        module.parse_args(["train"] if module is imagenet_eval else [])
    finally:
        vae_expand.Parser.__init__ = real
    return {o for p in parsers for action in p._actions for o in action.option_strings} - {"-h", "--help"}

def counts(file):
    return len((ROOT / file).read_text().splitlines()), len(flags_of(SCRIPTS[file]))

def commands(text):
    """Every command line of code blocks and code spans that runs one of the project's scripts -> words"""
    text = text.replace("\\\n", " ")
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
    blocks = re.sub(r"(?<!`)`[^`]+`(?!`)", "", text)
    lines = re.findall(r"^ {0,4}((?:\S*python3?|\S*torchrun) .*)$", blocks, re.M)
    spans = [span.replace("\n", " ") for span in spans if re.match(r"(\S+=\S+ )?(python|torchrun|pytest) ", span)]
    for code in spans + lines:
        for part in code.split("&&"):
            words = shlex.split(part.split(" #")[0])
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if scripts and re.search(r"python|torchrun", words[0]):
                yield words[scripts[0]], words[scripts[0] + 1:]

def test_links_point_to_what_they_name():
    assert len(LINKS.findall(README.read_text())) > 25
    for doc in DOCS:
        for name, file, line in LINKS.findall(doc.read_text()):
            expected = line_of(name, file, doc)
            assert int(line) == expected, f"{doc.name}, {name}: {file}, line {expected}; run this file"
        for target in re.findall(r"\]\(([^)#:]+)\)", doc.read_text()):
            assert (doc.parent / target).exists(), target

def anchors(doc):
    """The headings of a page, as GitHub names them in its addresses."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", doc.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

def test_links_to_headings():
    found = [(doc, *link) for doc in DOCS for link in re.findall(r"\]\(([^)#:]*)#(?!L\d)([^)]+)\)", doc.read_text())]
    assert len(found) > 20
    for doc, target, heading in found:
        assert heading in anchors(doc.parent / target if target else doc), (doc.name, target, heading)

def test_counts_of_lines_and_flags():
    rows = ROWS.findall(README.read_text())
    assert [file for _, file, *_ in rows] == list(SCRIPTS)
    for _, file, lines, flags in rows:
        assert (int(lines), int(flags)) == counts(file), f"{file}: {counts(file)}; run this file"

def test_commands_parse(capsys):
    found = [command for doc in DOCS for command in commands(doc.read_text())]
    assert len(found) > 30 and {script for script, _ in found} >= set(SCRIPTS)
    for script, words in found:
        assert (ROOT / script).is_file(), script
        if script in SCRIPTS and "..." not in words:
            assert isinstance(SCRIPTS[script].parse_args(words), argparse.Namespace), (script, words)

def test_flags_exist():
    known = set().union(*(flags_of(module) for module in SCRIPTS.values()))
    others = [*ROOT.glob("[ta]*/*.py"), *ROOT.glob("tests/tools/*.py"), *ROOT.glob("tests/exercises/*.py")]
    known |= set(re.findall(r'"(--[a-z0-9-]+)"', "".join(path.read_text() for path in others)))
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--help"}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", "".join(doc.read_text() for doc in DOCS)))
    assert not said - known

def test_pictures_are_shown_and_the_whole_is_short():
    assert README.read_text().count("\n") <= 225
    text = "".join(doc.read_text() for doc in DOCS)
    pictures = {path.name for path in (ROOT / "assets").glob("*.*") if path.suffix in (".png", ".gif")}
    pictures -= {"example.png"}
    assert not [name for name in pictures if f"]({name})" not in text and f"assets/{name})" not in text]

@pytest.mark.parametrize("file", SCRIPTS)
def test_help_is_a_page(file, capsys):
    """It opens with the chapter's docstring, and every flag has its line."""
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[file].parse_args(["--help"])
    page = capsys.readouterr().out
    assert stop.value.code == 0 and SCRIPTS[file].__doc__.splitlines()[0] in page
    assert file == "imagenet_eval.py" or all(flag in page for flag in flags_of(SCRIPTS[file]))

def test_torchrun_leaves_our_flags_alone():
    """It takes a flag that begins one of its own for an abbreviation, wherever it stands."""
    from torch.distributed.run import get_args_parser
    theirs = {option for action in get_args_parser()._actions for option in action.option_strings}
    ours = set().union(*(flags_of(module) for module in SCRIPTS.values()))
    clashes = {flag for flag in ours if any(option.startswith(flag) for option in theirs)}
    assert clashes == {"--n", "--start"} and {"--per-prompt", "--decoder-start"} <= ours       # the same flags

def test_old_pythons_parse_every_file():
    import ast
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("assets/*.py")]:
        ast.parse(path.read_text(), feature_version=(3, 10))

if __name__ == "__main__":
    for page in DOCS:
        page_text = LINKS.sub(lambda m: f"[{m[1]}]({m[2]}#L{line_of(m[1], m[2], page)})", page.read_text())
        page.write_text(ROWS.sub(lambda m: "{}{} | {}".format(m[1], *counts(m[2])), page_text))
