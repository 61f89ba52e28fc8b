"""Checks of plain files, for commits: trailing blanks, last newline, size, conflict marks, notebooks without outputs.

``python scripts/check_files.py FILE ...`` names everything that is wrong and exits with 1 if anything is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

#: Larger files are data; only data/ holds some.
LARGEST = 500_000
TEXT = frozenset(
    {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".jsonl", ".jinja"}
    | {".cff", ".ipynb", ".html", ".css", ".js", ".svg", ".cfg", ".typed"}
)
CONFLICT = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)


def problems(path: Path) -> list[str]:
    """Everything wrong with one file, a sentence each."""
    size = path.stat().st_size
    found = []
    if size > LARGEST and path.parts[0] != "data":
        found.append(f"holds {size:,} bytes, more than {LARGEST:,}; keep it out of the repository")
    if path.suffix not in TEXT and path.name not in ("Makefile", "LICENSE", "run"):
        return found
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return [*found, "is not UTF-8"]
    lines = text.split("\n")
    blanks = [number for number, line in enumerate(lines, start=1) if line.endswith((" ", "\t", "\r"))]
    drawn = path.suffix == ".svg"  # matplotlib ends the lines of a path with a blank
    if blanks and path.parts[0] != "data" and not drawn:
        found.append(f"has blanks at the end of line {blanks[0]}")
    if text and path.parts[0] != "data" and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append("does not end with exactly one newline")
    if CONFLICT.search(text):
        found.append("holds the marks of a merge conflict")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        ran = [n for n, cell in enumerate(cells) if cell.get("outputs") or cell.get("execution_count")]
        if ran:
            found.append(f"has outputs in cell {ran[0]}; clear all outputs before a commit")
    return found


def main() -> int:
    wrong = [f"{name} {problem}" for name in sys.argv[1:] for problem in problems(Path(name))]
    for line in wrong:
        print(line)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
