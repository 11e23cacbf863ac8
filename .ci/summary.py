"""Summarises a full run: the parts with their seconds, and the tests that no part has run.

    python3 .ci/summary.py FOLDER PART ...

FOLDER holds `results`, with a line "part status seconds user system" for each part, its log, and
the JUnit reports of the parts that run tests. The exit status is 1 if a part failed, or has no
line.
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def main(folder: Path, expected: list[str]) -> int:
    rows = [line.split() for line in (folder / "results").read_text().splitlines()]
    statuses = {part: int(status) for part, status, *_ in rows}
    print("\npart     seconds  CPU seconds")
    for part, _, seconds, user, system in rows:
        print(f"{part:8} {seconds:>7}  {float(user) + float(system):11.0f}")
    for part in statuses:
        for line in (folder / f"{part}.log").read_text().splitlines():
            if line.startswith("skipped: the index"):
                print(f"{part}: {line}")
    counts = never_run(sorted(folder.glob("*.xml")))
    if counts:
        print(f"{sum(counts.values())} tests ran in no part:")
        for reason, count in counts.most_common():
            print(f"{count:5}  {reason}")
    failed = [part for part in expected if statuses.get(part) != 0]
    print(f"FAILED: {', '.join(failed)}" if failed else f"passed: {', '.join(statuses)}")
    return 1 if failed else 0


def never_run(reports: list[Path]) -> Counter[str]:
    """Reason → number of the tests that every report skips."""
    ran: set[tuple[str, str]] = set()
    reasons: dict[tuple[str, str], str] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            key = (case.get("classname", ""), case.get("name", ""))
            skipped = case.find("skipped")
            if skipped is None or skipped.get("type") == "pytest.xfail":
                ran.add(key)
            else:
                reasons[key] = skipped.get("message", "")
    # A module that is skipped as a whole is a test case with the module's name and no class.
    modules = {classname for classname, _ in ran}
    return Counter(
        reason
        for (classname, name), reason in reasons.items()
        if (classname, name) not in ran and (classname or name not in modules)
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
