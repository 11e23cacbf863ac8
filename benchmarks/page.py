"""Writes the tables of a report into a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def filled(page: str, report: Mapping[str, Any]) -> str:
    """The page with the numbers of the report between ``<!-- table: NAME -->`` and
    ``<!-- end -->``.

    Raises:
        KeyError: a marker names no table.
    """

    def table(found: re.Match[str]) -> str:
        return "\n".join([found[1], *TABLES[found[2]](report), found[3]])

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", table, page, flags=re.S)


def _machine(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        " · ".join(f"{key} {value}" for key, value in report["machine"].items())
        + f" · {report['runs']} runs"
    )


def _ratios(report: Mapping[str, Any]) -> Iterator[str]:
    threads = list(report["threads"])
    columns = " | ".join(f"{n} thread(s)" for n in threads)
    yield f"| what | way | against | target | {columns} | µs | spread |"
    yield f"|---|---|---|--:|{'--:|' * len(threads)}--:|--:|"
    for rows in zip(*report["threads"].values(), strict=True):
        first = rows[0]
        target = "" if first["at_most"] is None else f"{first['at_most']:.2f}"
        others = [
            f"{row['ratio']:.2f}" for row in rows[1:]
        ]  # targets are for the first number of threads
        ratios = " | ".join([_against(first["ratio"], first["at_most"]), *others])
        yield (
            f"| {first['what']} | {first['variant']} | {first['against']} | {target} | {ratios} "
            f"| {first['microseconds']:,.0f} | {first['spread']:.0%} |"
        )


def _totals(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| what | target | value | unit |"
    yield "|---|--:|--:|---|"
    for row in report["totals"]:
        target = "" if row["at_most"] is None else f"{row['at_most']:g}"
        yield f"| {row['what']} | {target} | {row['value']:.3g} | {row['unit']} |"


def _against(ratio: float, at_most: float | None) -> str:
    """A ratio; bold where it misses its target, as it is printed."""
    printed = f"{ratio:.2f}"
    return f"**{printed}**" if at_most is not None and float(printed) > at_most else printed


TABLES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "machine": _machine,
    "ratios": _ratios,
    "totals": _totals,
}
