"""Every code block of the README and of docs/ runs."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bertloss_fast as bf
from tests import readme_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(.*)\n((?s:.*?))^```$", re.MULTILINE)
BLOCKS = [
    pytest.param(fence, text, id=f"{page.name}-{number}-{fence}")
    for page in PAGES
    for number, (fence, text) in enumerate(BLOCK.findall(page.read_text()))
]
# Programs that take minutes are shown to start: their own tests run them through.
LONG = (
    *(f"examples/train_{name}.py" for name in ("multilabel", "multiclass", "xmc", "reranker")),
    "examples/finetune_bert.py",
    "bench",
    "bench.sass",
)
SHORT = {program: ["--help"] for program in LONG}


def check_command(command: list[str]) -> list[str]:
    """What shows in seconds that a command of the documentation is right."""
    if command[0] == "make":
        return ["make", "--dry-run", *command[1:]]
    if command[:2] == ["pip", "install"]:
        return [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", *command[2:]]
    assert command[0] in ("python", ".venv/bin/python"), f"no check for {shlex.join(command)!r}"
    program = command[2] if command[1] == "-m" else command[1]
    return [
        sys.executable,
        *command[1 : command.index(program) + 1],
        *SHORT.get(program, command[command.index(program) + 1 :]),
    ]


@pytest.mark.parametrize(("fence", "text"), BLOCKS)
def test_code_block(fence: str, text: str, tmp_path: Path) -> None:
    language, _, user = fence.partition(" yours=")
    if language == "python":
        names = getattr(readme_names, user)(tmp_path) if user else {}
        exec(compile(text, "<documentation>", "exec"), {"__name__": "__main__"} | names)
    elif language == "sh":
        for line in text.strip().splitlines():
            command = shlex.split(line, comments=True)
            variables = dict(word.split("=", 1) for word in command if re.fullmatch(r"[A-Z_]+=.*", word))
            words = [word for word in command if not re.fullmatch(r"[A-Z_]+=.*", word)]
            environment = {**os.environ, **variables}
            result = subprocess.run(
                check_command(words), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
            )
            assert result.returncode == 0, result.stdout + result.stderr
    else:
        assert fence == "text", f"a block in {fence!r} has no test"


@pytest.mark.parametrize("name", bf.__all__)
def test_examples_of_docstrings(name: str) -> None:
    examples = doctest.DocTestFinder().find(getattr(bf, name), name, globs={})
    assert any(test.examples for test in examples)
    assert all(doctest.DocTestRunner().run(test).failed == 0 for test in examples)
