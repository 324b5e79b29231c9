"""`make bench`, or `python -m benchmarks [NAME...]` for some: measures the service on this machine, one thing after the
other, and writes each section of `results.md`; sections that were not measured stay as they were.

The machine should have nothing else to do. `--long` soaks for an hour and moves an alias a thousand times.
"""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import identification, lasting, measures, runtimes
from benchmarks.clients import CPUS, Setting, scratch
from model_store import LocalStore, builtin_store_path

MEASURES: dict[str, Callable[[Setting], list[str]]] = {
    "overhead": measures.overhead,
    "runtimes": runtimes.runtimes,
    "profile": measures.profile,
    "peers": measures.peers,
    "idle": measures.idle,
    "mixed": measures.mixed,
    "streams": measures.streams,
    "small": measures.small,
    "start": measures.start,
    "identify": identification.identify,
    "overload": lasting.overload,
    "trickle": lasting.trickle,
    "moves": lasting.moves,
    "soak": lasting.soak,
}
DEFAULT = "sotto-edge"
RESULTS = Path(__file__).with_name("results.md")
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)}; default: all")
    parser.add_argument("--model", default=DEFAULT, help="of the built-in store; others get sections of their own")
    parser.add_argument("--long", action="store_true")
    given = parser.parse_args()
    unknown = set(given.names) - set(MEASURES)
    if unknown:
        parser.error(f"there is no measurement {', '.join(sorted(unknown))}")
    store = LocalStore(builtin_store_path())
    bundle = store.resolve(given.model)
    model = f"{bundle.manifest.name}@{bundle.manifest.version}"
    title = (
        f"# The service on {CPUS} cores\n\n`make bench`: {platform.machine()}, Python {platform.python_version()}; "
        "load generators share the cores.\n"
    )
    for name in given.names or MEASURES:
        with scratch() as folder:
            setting = Setting(
                bundle,
                folder,
                soak_s=3600.0 if given.long else 600.0,
                moves=1000 if given.long else 50,
                plots=RESULTS.parent,
            )
            lines = MEASURES[name](setting)
        if given.model != DEFAULT:
            lines[0] += f", {model}"
        else:
            # Sections are measured one by one, and versions move on.
            lines += ["", f"With {model}."]
        print("\n".join(lines), flush=True)  # noqa: T201  the command's output
        write(title, lines)


def write(title: str, lines: list[str]) -> None:
    """Put the section in its place in the results, or at their end."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    heads = list(SECTION.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    # Without any section yet, there is one end and no beginning.
    sections = {head[1]: text[head.start() : end].rstrip() for head, end in zip(heads, ends, strict=False)}
    sections[lines[0].removeprefix("## ")] = "\n".join(lines)
    RESULTS.write_text("\n\n".join([title.rstrip(), *sections.values()]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
