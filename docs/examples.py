"""Runs the examples of the documentation, page by page, and writes or checks the output that is printed below each of them.

    python docs/examples.py            rewrites every ```text block that follows a ```python block
    python docs/examples.py --check    changes nothing; exit status 1 if an output differs other than in the last digits

The blocks of one page share one namespace and run from top to bottom, as a reader would type them.
"""

import argparse
import contextlib
import io
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent
PAIR = re.compile(r"```python\n(.*?)```(\n\n```text\n(.*?)\n```)?", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+\.\d+(e[-+]\d+)?|\d+e[-+]\d+")

sys.path.insert(0, str(ROOT.parent))


def run(page: pathlib.Path) -> tuple[str, list[tuple[str, str]]]:
    """The page with fresh outputs, and the (old, new) outputs that differ, floating-point numbers apart."""
    scope: dict[str, object] = {"__name__": "docs"}
    changed = []

    def fresh(match):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(match[1], str(page), "exec"), scope)
        if match[2] is None:
            return match[0]
        new = "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
        if NUMBER.sub("#", new).split() != NUMBER.sub("#", match[3]).split():
            changed.append((match[3], new))
        return f"```python\n{match[1]}```\n\n```text\n{new}\n```"

    return PAIR.sub(fresh, page.read_text()), changed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs the examples of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if an output differs")
    check = parser.parse_args(argv).check
    status = 0
    for page in sorted(ROOT.glob("*.md")):
        text, changed = run(page)
        if not check:
            page.write_text(text)
        elif changed:
            status = 1
            print("\n".join(f"{page.name}: documented\n{old}\nis now\n{new}\n" for old, new in changed))
    return status


if __name__ == "__main__":
    sys.exit(main())
