"""Scores of a GGUF through the runtime: python score_gguf.py SET -m GGUF --mmproj GGUF [--answers FILE] [-- OPTIONS]

One `hae run` for every row, greedy, with the row's prompt as it is and its number of crops; what follows `--`
goes to `hae run`, for instance `--kv-policy hae`.  Chats as in evaluate.py: each turn behind the right answers of
the turns before it.  FILE takes the answers as they come, and a run that begins with it goes on behind the last.
Needs no package beside Python's own.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scoring import STORY_LIMITS, Row, Told, chat_scores, read, story_scores, turns_of, understanding_scores

PARTS = ("understanding", "chat", "story")
ANSWER_LIMIT = 256  # tokens; the longest answer of the sets is a caption of 161


def digest(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(path.read_bytes())
    return whole.hexdigest()


@dataclass
class Answers:
    """What was answered so far, by row, and the file that keeps it; ``made`` says by what."""

    made: dict[str, Any]
    path: Path | None = None
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        if self.path is None:
            return
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[:text.rfind("\n") + 1]  # a run that was killed may have left half a line
        lines = [json.loads(x) for x in whole.splitlines()] or [self.made]
        if lines[0] != self.made:
            other = [k for k in self.made if lines[0].get(k) != self.made[k]]
            sys.exit(f"{self.path}: holds answers of another run ({', '.join(other)}), expected this one's or no file")
        self.known = {x["id"]: x for x in lines[1:]}
        self.path.write_text(whole or json.dumps(self.made) + "\n")

    def add(self, answer: dict[str, Any]) -> None:
        with self.lock:
            self.known[answer["id"]] = answer
            if self.path is not None:
                with self.path.open("a") as f:
                    f.write(json.dumps(answer) + "\n")


@dataclass
class Runtime:
    folder: Path
    command: list[str]
    jobs: int
    answers: Answers

    def ask(self, row: Row, limit: int) -> None:
        images = [part for name in row["images"] for part in ("--image", str(self.folder / name))]
        words = [*self.command, *images, "--num-crops", str(row["num_crops"]), "-n", str(limit), "-p", row["prompt"]]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{row['id']}: {done.stderr.strip()}")
        report = json.loads(done.stdout)
        tokens, cells = report["tokens"], report["kv"]["cells"]
        self.answers.add({
            "id": row["id"], "text": report["text"], "finish": report["finish"], "tokens": tokens["generated"],
            "full_cells": sum(tokens["prompt"].values()) + tokens["generated"], "peak_cells": cells["peak"],
            "cells": sum(cells["live"].values()) + sum(cells["binned"].values()),
            "visual": tokens["prompt"]["vision"], "visual_cells": cells["live"]["vision"] + cells["binned"]["vision"]})

    def all(self, part: str, rows: list[Row], limits: list[int]) -> list[dict[str, Any]]:
        """The answers to all rows, those that are not known yet from the program."""
        known, began = self.answers.known, time.monotonic()
        open_ = [(r, n) for r, n in zip(rows, limits) if r["id"] not in known]
        with ThreadPoolExecutor(self.jobs) as pool:
            for i, _ in enumerate(pool.map(lambda x: self.ask(*x), open_), 1):
                if i % 50 == 0 or i == len(open_):
                    print(f"{part}: {len(rows) - len(open_) + i} of {len(rows)}, {time.monotonic() - began:.0f} s", file=sys.stderr)
        return [known[r["id"]] for r in rows]

    def hits(self, part: str, rows: list[Row]) -> dict[str, bool]:
        """Whether the answer is right, word for word, and the model ended it there."""
        answers = self.all(part, rows, [ANSWER_LIMIT] * len(rows))
        return {r["id"]: a["finish"] == "eog" and a["text"].strip() == r["answer"] for r, a in zip(rows, answers)}

    def stories(self, part: str, rows: list[Row]) -> dict[str, Told]:
        answers = self.all(part, rows, [STORY_LIMITS[r["kind"]] for r in rows])
        return {a["id"]: Told(a["text"].strip(), a["tokens"], a["finish"] == "eog") for a in answers}

    def cells(self, rows: list[Row]) -> dict[str, float]:
        """Mean shares of what the full cache holds at the end: cells at the end and at most, and visual ones."""
        some = [self.answers.known[r["id"]] for r in rows]
        mean = lambda part, whole: round(sum(a[part] / a[whole] for a in some) / max(1, len(some)), 4)  # noqa: E731
        return {"end": mean("cells", "full_cells"), "most": mean("peak_cells", "full_cells"), "visual": mean("visual_cells", "visual")}


def score(run: Runtime, parts: list[str], every: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part in parts:
        rows = read(run.folder / f"{part}.jsonl")[::every]
        if part == "understanding":
            out[part] = understanding_scores(rows, run.hits(part, rows))
        elif part == "chat":
            rows = turns_of(rows)
            out[part] = chat_scores(rows, run.hits(part, rows))
        else:
            out[part] = story_scores(rows, run.stories(part, rows))
            out[part].pop("texts")
        out[part]["cells"] = run.cells(rows)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("-m", "--model", type=Path, required=True)
    p.add_argument("--mmproj", type=Path, required=True)
    p.add_argument("--hae", default="hae", help="the program")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--every", type=int, default=1, help="score every N-th row only")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    p.add_argument("--answers", type=Path, help="keep every answer here (JSON lines), and go on from it")
    p.add_argument("--out", type=Path, help="write the scores here, too")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    a, options = p.parse_args(words[:cut]), words[cut + 1:]
    if shutil.which(a.hae) is None:
        p.error(f"--hae: {a.hae} is no program, expected the path of hae")
    command = [a.hae, "run", "-m", str(a.model), "--mmproj", str(a.mmproj), "--no-conversation", "--temp", "0", "-t", "1",
               "-c", "4096", "-o", "json", *options]
    made = {"model": digest([a.model]), "mmproj": digest([a.mmproj]), "options": options,
            "set": digest(a.folder / f"{part}.jsonl" for part in PARTS)}
    answers = Answers(made, a.answers)
    answers.open()
    result = made | score(Runtime(a.folder, command, a.jobs, answers), a.parts, a.every)
    text = json.dumps(result, indent=1) + "\n"
    if a.out:
        a.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
