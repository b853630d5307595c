"""``python -m bench.card [FILES] [--output PAGE] [--picture SVG] [--readme FILE]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.card.page import page
from bench.card.picture import picture
from bench.card.read import newest, runs
from bench.card.readme import written

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.card", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of bench/results")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "report.html")
    parser.add_argument("--picture", type=Path, help="also write the README's picture here")
    parser.add_argument("--readme", type=Path, help="also write the table of this README")
    options = parser.parse_args(argv)
    files = options.files or sorted((ROOT / "bench" / "results").glob("*.json"))
    found = runs(files)
    if not found:
        parser.error("no results file: run `make bench` or `make gpu`, or name one")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(found))
    print(f"wrote {options.output}: {len(found)} run(s)")
    if options.picture:
        options.picture.write_text(picture(newest(found)))
        print(f"wrote {options.picture}")
    if options.readme:
        options.readme.write_text(written(options.readme.read_text(), newest(found)))
        print(f"wrote {options.readme}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
