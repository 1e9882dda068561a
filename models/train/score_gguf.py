"""Scores of a GGUF through the runtime: python score_gguf.py SET -m GGUF --mmproj GGUF [--hae PROGRAM] [-- OPTIONS]

One `hae run` for every row, greedy, with the row's prompt as it is and its number of crops; what
follows `--` goes to `hae run`, for instance a policy.  Scores as evaluate.py's, without PyTorch.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoring import STORY_LIMITS, Row, Told, chat_scores, read, story_scores, turns_of, understanding_scores

ANSWER_LIMIT = 256  # tokens; the longest answer of the sets is a caption of about 200


@dataclass
class Runtime:
    folder: Path
    command: list[str]
    jobs: int

    def ask(self, row: Row, limit: int) -> dict[str, Any]:
        """What `hae run -o json` reports."""
        images = [part for name in row["images"] for part in ("--image", str(self.folder / name))]
        words = [*self.command, *images, "--num-crops", str(row["num_crops"]), "-n", str(limit), "-p", row["prompt"]]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{row['id']}: {done.stderr.strip()}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def all(self, rows: list[Row], limits: list[int]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(self.ask, rows, limits))

    def hits(self, rows: list[Row]) -> dict[str, bool]:
        """Whether the answer is right, word for word, and the model ended it there."""
        reports = self.all(rows, [ANSWER_LIMIT] * len(rows))
        return {r["id"]: x["finish"] == "eog" and x["text"].strip() == r["answer"] for r, x in zip(rows, reports)}

    def stories(self, rows: list[Row]) -> dict[str, Told]:
        reports = self.all(rows, [STORY_LIMITS[r["kind"]] for r in rows])
        return {r["id"]: Told(x["text"].strip(), x["tokens"]["generated"], x["finish"] == "eog") for r, x in zip(rows, reports)}


def score(run: Runtime, parts: list[str], every: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for part in parts:
        began = time.monotonic()
        rows = read(run.folder / f"{part}.jsonl")[::every]
        if part == "understanding":
            out[part] = understanding_scores(rows, run.hits(rows))
        elif part == "chat":
            rows = turns_of(rows)
            out[part] = chat_scores(rows, run.hits(rows))
        else:
            out[part] = story_scores(rows, run.stories(rows))
        print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("-m", "--model", type=Path, required=True)
    p.add_argument("--mmproj", type=Path, required=True)
    p.add_argument("--hae", default="hae", help="the program")
    p.add_argument("--parts", nargs="+", choices=["understanding", "chat", "story"], default=["understanding", "chat", "story"])
    p.add_argument("--every", type=int, default=1, help="score every N-th row only")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    p.add_argument("--out", type=Path, help="write everything here as JSON, stories included")
    p.add_argument("options", nargs="*", help="more options of hae run, behind --")
    a = p.parse_args()
    command = [a.hae, "run", "-m", str(a.model), "--mmproj", str(a.mmproj), "--no-conversation", "--temp", "0", "-t", "1",
               "-c", "4096", "-o", "json", *a.options]
    result = score(Runtime(a.folder, command, a.jobs), a.parts, a.every)
    if a.out:
        a.out.write_text(json.dumps(result, indent=1) + "\n")
    for part in result.values():
        part.pop("texts", None)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
