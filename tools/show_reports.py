"""Reports of a collection beside what `engine/data/preparation/reports.py` makes of them, for a person to read.

    python -m tools.show_reports --reports ecgen-radiology.tgz --changed --count 60

reads OpenI's XML files (a folder, or the archive `NLMCXR_reports.tgz` as it is) or text files as in MIMIC-CXR. Without
--reports it takes OpenI's archive from an installed torchxrayvision.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import random
import re
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pspg.engine.data.preparation.reports import impression

SUSPECTS = {
    "physician": r"\b(?:Dr|MD|physician|radiologist|resident|attending)\b",
    "told": r"\b(?:discussed|notified|telephone|paged|communicated|called)\b",
    "redacted": r"XXXX|___",
    "view": r"\b(?:PA|AP|frontal|lateral|portable|lordotic|decubitus|projections?|views?)\b",
    "list number": r"(?:^|[.:;]\s)\d{1,2}[.)](?=\s|[A-Z])",
    "date or time": r"\b\d{1,2}[/:-]\d{2}\b|\b(?:19|20)\d\d\b",
    "heading": r"\b(?:IMPRESSION|FINDINGS|COMPARISON|CONCLUSION|HISTORY)\b\s*:",
    "stray sign": r"[<>\[\]&]|\s[.,;]|\.\.|,\.",
    "cut off": r"\b(?:of|the|with|from|on|at|in|to|by|and|or|a|an|for)[.,;]",
}


def main() -> int:
    """Print examples and counts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--reports", type=Path, help="folder of .xml or .txt reports, or a .tgz of .xml files")
    parser.add_argument("--count", type=int, default=60, help="examples to print")
    parser.add_argument("--seed", type=int, default=0, help="which examples")
    parser.add_argument("--changed", action="store_true", help="only examples that were changed")
    parser.add_argument("--suspect", choices=SUSPECTS, help="only examples in which this was left over")
    arguments = parser.parse_args()
    shown: list[tuple[str, str, str | None]] = []
    counts: Counter[str] = Counter()
    for name, report in read_reports(arguments.reports or openi_archive()):
        raw = re.split(r"^IMPRESSION:", report, maxsplit=1, flags=re.MULTILINE)[-1].strip()
        cut = impression(report)
        found = [kind for kind, pattern in SUSPECTS.items() if cut and re.search(pattern, cut)]
        counts.update(["reports", "with a text" if cut else "without", *found])
        changed = cut is not None and cut != raw
        counts["changed"] += changed
        if (changed or not arguments.changed) and (arguments.suspect is None or arguments.suspect in found):
            shown.append((name, raw, cut))
    random.Random(arguments.seed).shuffle(shown)
    for name, raw, cut in shown[: arguments.count]:
        print(f"{name}\n  raw  {raw}\n  cut  {cut}\n")
    print(", ".join(f"{key} {number:,}" for key, number in counts.items()))
    return 0


def openi_archive() -> Path:
    """The archive that torchxrayvision carries; found without importing the package."""
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("give --reports, or: pip install --no-deps torchxrayvision")
    return Path(spec.submodule_search_locations[0], "data", "NLMCXR_reports.tgz")


def read_reports(place: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every report."""
    if place.is_dir():
        for path in sorted(place.rglob("*")):
            if path.suffix == ".xml":
                yield path.name, openi_report(path.read_bytes())
            elif path.suffix == ".txt":
                yield path.name, path.read_text("utf-8", "replace")
        return
    with tarfile.open(place) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None and member.name.endswith(".xml"):
                yield Path(member.name).name, openi_report(file.read())


def openi_report(xml: bytes) -> str:
    """The sections of an OpenI file as a plain report with headings."""
    sections = ElementTree.fromstring(xml).iter("AbstractText")
    return "\n".join(f"{section.get('Label')}: {html.unescape(section.text or '')}" for section in sections)


if __name__ == "__main__":
    sys.exit(main())
