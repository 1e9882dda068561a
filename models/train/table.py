"""Scores side by side, as Markdown: python table.py NAME=SCORES ...

SCORES is a file of evaluate.py or of score_gguf.py; all of them must be of the same set.  Intervals are Wilson's,
95 %.  Facts have none: those of one story stand or fall together.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scoring import STORY_LIMITS, wilson

Scores = dict[str, Any]
Row = tuple[str, Callable[[Scores], str]]


def percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def interval(share: Scores) -> str:
    hits, n = round(share["accuracy"] * share["n"]), share["n"]  # what is kept is rounded
    low, high = wilson(hits, n)
    return f"{percent(hits / n)} ({percent(low)} to {percent(high)})"


def of_story(kind: str, part: str) -> Callable[[Scores], str]:
    def cell(s: Scores) -> str:
        story = s["story"][kind]
        if part == "exact":
            return interval({"accuracy": story["exact"], "n": story["n"]})
        return percent(story[part])
    return cell


def cells(part: str, key: str) -> Callable[[Scores], str]:
    """The runtime's; PyTorch keeps everything."""
    return lambda s: percent(s[part].get("cells", {}).get(key, 1.0))


def lines(first: Scores) -> list[Row]:
    """What there is to show: a name with the number of cases, and the cell of a column."""
    def share(name: str, get: Callable[[Scores], Scores]) -> Row:
        return f"{name} ({get(first)['n']})", lambda s: interval(get(s))

    def of_task(task: str) -> Row:
        return share(task, lambda s: s["understanding"]["by_task"][task])

    out = [share("**all questions**", lambda s: s["understanding"])]
    out += [of_task(t) for t in first["understanding"]["by_task"]]
    out += [("visual tokens in the cache at the end", cells("understanding", "visual")),
            share("**chat turns**", lambda s: s["chat"]), share("that ask on with \"it\"", lambda s: s["chat"]["follow"]),
            share("whole chats", lambda s: s["chat"]["whole_chats"])]
    for kind in STORY_LIMITS:
        n, facts = first["story"][kind]["n"], first["story"][kind]["facts"]
        name = "stories" if kind == "story" else f"{kind}s"
        out += [(f"**{name}** word for word ({n})", of_story(kind, "exact")),
                (f"facts told, of those to tell ({facts})", of_story(kind, "recall")),
                ("facts right, of those told", of_story(kind, "precision"))]
    return out + [("cells in use at most, of the full cache's", cells("story", "most"))]


def table(columns: dict[str, Scores]) -> str:
    rows = lines(next(iter(columns.values())))
    out = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(out + [f"| {name} | " + " | ".join(cell(s) for s in columns.values()) + " |" for name, cell in rows])


if __name__ == "__main__":
    if len(sys.argv) < 2 or any("=" not in x for x in sys.argv[1:]):
        sys.exit(str(__doc__))
    print(table({name: json.loads(Path(path).read_text()) for name, path in (x.split("=", 1) for x in sys.argv[1:])}))
