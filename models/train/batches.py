"""Training and evaluation batches: every batch is a function of its kind and seed."""
from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import asking
import stories
from asking import TASKS, Ask
from draw import num_visual, patch_labels, pixels
from packed import Pack
from tokenizer import Tok, chat
from world import COLORS, LAYOUTS, NAMES, SHAPES, SMALL, Layout, Scene, make_scene

KINDS = ("patch", "copy", "names", "qa", "multi", "chat", "story", "saga")
QUESTIONS = 28  # behind one picture


@dataclass
class Batch:
    """One kind, one layout.  n rows; every row has its visual tokens at the same places."""

    kind: str
    layout: Layout
    pictures: int                 # per row
    px: Tensor | None             # uint8 [n * pictures, H, W, 3], HD pictures
    patch: Tensor | None          # int64 [n * pictures, tokens, heads], see draw.patch_labels
    ids: Tensor                   # [n, t], negative = visual token
    at: Tensor                    # [visual] columns of the visual tokens
    piece: tuple[int, int]        # which of the picture's visual tokens are used (from, to)
    pack: Pack | None
    where: Tensor                 # [m] flat positions whose next token is learned
    target: Tensor                # [m]
    answer: Tensor                # [m] which answer the token belongs to
    task: Tensor                  # [answers] index into TASKS, -1 = none

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with every tensor changed."""
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **{k: change(x) for k, x in tensors.items()})  # type: ignore[arg-type]


Rows = list[tuple[list[Scene], list[Ask]]]


class Maker:
    """Builds batches of about ``tokens`` tokens."""

    def __init__(self, tok: Tok, tokens: int) -> None:
        self.tok, self.tokens = tok, tokens
        words = [*NAMES, *NAMES, *COLORS, *SHAPES, "big", "small", "the", "was"]
        self.lexicon = [tok.t.encode(w, add_special_tokens=False).ids[0] for w in words]
        self.names = set(self.lexicon[:len(NAMES)])

    # ------------------------------------------------------------------ text
    def head(self, layout: Layout, pictures: int) -> list[int]:
        text = chat("", pictures).split("<|end|>")[0].rstrip("\n")
        return self.tok.prompt(text, [num_visual(layout)] * pictures)

    def turns(self, asks: list[Ask], alone: bool) -> list[list[int]]:
        """Token ids of question and answer, the first one (or each, if alone) right behind the pictures."""
        texts = [("\n" if alone or not i else "<|user|>\n") + f"{q.question}<|end|>\n<|assistant|>\n{q.answer}<|end|>\n"
                 for i, q in enumerate(asks)]
        ids = [e.ids for e in self.tok.t.encode_batch(texts)]  # each starts with <s>
        return [x if alone or not i else x[1:] for i, x in enumerate(ids)]

    def _learn(self, ids: list[int]) -> list[int]:
        """Positions from <|assistant|> up to the token before <|end|>."""
        out, on = [], False
        for i, x in enumerate(ids):
            on = (on or x == self.tok.assistant) and x != self.tok.end
            if on:
                out.append(i)
        return out

    # ------------------------------------------------------------------ batches from rows
    def batch(self, kind: str, layout: Layout, rows: Rows, packed: bool) -> Batch:
        """Rows of pictures and questions (all with as many pictures) as a batch."""
        pictures = len(rows[0][0])
        head = self.head(layout, pictures)
        said = [self.turns(asks, packed) for _, asks in rows]
        if packed:
            count, length = max(map(len, said)), max(len(t) for s in said for t in s)
            length = -(-length // 4) * 4
            pack, width = (len(head), count, length), len(head) + count * length
        else:
            pack, width = None, len(head) + max(sum(map(len, s)) for s in said)
            width = -(-width // 8) * 8
        ids = np.zeros((len(rows), width), np.int64)
        where: list[int] = []
        target: list[int] = []
        answer: list[int] = []
        task: list[int] = []
        for r, turns in enumerate(said):
            ids[r, :len(head)] = head
            start = len(head)
            for j, t in enumerate(turns):
                if packed:
                    start = len(head) + j * pack[2]  # type: ignore[index]
                ids[r, start:start + len(t)] = t
                learn = self._learn(t)
                where += [r * width + start + i for i in learn]
                target += [t[i + 1] for i in learn]
                answer += [len(task)] * len(learn)
                name = rows[r][1][j].task
                task.append(TASKS.index(name) if name in TASKS else -1)
                start += len(t)
        return Batch(kind, layout, pictures, self._px(rows), self._patch(rows), torch.from_numpy(ids),
                     torch.tensor([i for i, x in enumerate(head) if x < 0]), (0, num_visual(layout)), pack,
                     torch.tensor(where), torch.tensor(target), torch.tensor(answer), torch.tensor(task))

    @staticmethod
    def _px(rows: Rows) -> Tensor:
        return torch.from_numpy(np.stack([pixels(s) for scenes, _ in rows for s in scenes]))

    @staticmethod
    def _patch(rows: Rows) -> Tensor:
        return torch.from_numpy(np.stack([patch_labels(s) for scenes, _ in rows for s in scenes]))

    # ------------------------------------------------------------------ kinds
    def make(self, kind: str, seed: int, layout: Layout = SMALL, pictures: int = 1, n: int = 0,
             weight: dict[str, float] | None = None, easy: bool = False) -> Batch:
        """n = 0: as many rows as the token budget allows; easy: few objects."""
        rng = random.Random(seed)
        size = lambda each: n or max(1, self.tokens // each)  # noqa: E731
        visual = num_visual(layout) * pictures
        if kind == "copy":
            return self._copy(rng, size(96))
        if kind == "patch":
            empty = torch.zeros(0, dtype=torch.long)
            rows: Rows = [([self.scene(rng, layout)], []) for _ in range(size(2 * visual))]
            return Batch(kind, layout, 1, self._px(rows), self._patch(rows), empty.view(0, 0), empty,
                         (0, visual), None, empty, empty, empty, empty)
        if kind == "names":
            return self._names(rng, layout, size(300))
        if kind in ("story", "saga"):
            rows = [self.story_row(rng, layout, pictures) for _ in range(size(visual + (480 if kind == "story" else 1250)))]
            return self.batch(kind, layout, rows, packed=False)
        if kind == "chat":
            rows = [self._chat_row(rng, layout, pictures, weight) for _ in range(size(visual + 300))]
            return self.batch(kind, layout, rows, packed=False)
        rows = []
        for _ in range(size(visual + QUESTIONS * 24)):
            scenes = [self.scene(rng, layout, high=easy and layout.low + 1) for _ in range(pictures)]
            asks = asking.questions(scenes[0], rng) if pictures == 1 else asking.multi_questions(scenes, rng)
            rows.append((scenes, asking.pick(asks, QUESTIONS, rng, weight)))
        return self.batch(kind, layout, rows, packed=True)

    @staticmethod
    def scene(rng: random.Random, layout: Layout, low: int = 0, high: int = 0) -> Scene:
        return make_scene(rng.getrandbits(40), layout, low, high)

    def _chat_row(self, rng: random.Random, layout: Layout, pictures: int,
                  weight: dict[str, float] | None) -> tuple[list[Scene], list[Ask]]:
        scenes = [self.scene(rng, layout) for _ in range(pictures)]
        turns = asking.chat_turns(scenes, rng, rng.randint(7, 11), weight)
        if pictures == 1 and rng.random() < 0.4:
            turns.insert(0, asking.ask_caption(scenes[0]))
        return scenes, turns

    def story_row(self, rng: random.Random, layout: Layout, pictures: int, cast: int = 0) -> tuple[list[Scene], list[Ask]]:
        """cast = 0: 3 to 6 characters a picture, fewer when there are three pictures."""
        n = cast or rng.randint(3, 6 if pictures < 3 else 4)
        scenes = [self.scene(rng, layout, max(layout.low, n)) for _ in range(pictures)]
        casts: list[stories.Cast] = []
        taken: set[str] = set()
        for s in scenes:
            casts.append(stories.make_cast(s, rng, n, taken))
            taken |= {name for name, _, _ in casts[-1]}
        text = stories.story(scenes, casts)
        return scenes, [Ask("story", stories.story_question(casts), text, frozenset())]

    def _copy(self, rng: random.Random, n: int, width: int = 96) -> Batch:
        """Random words said again and again, no picture: teaches the decoder to look back."""
        ids = np.zeros((n, width), np.int64)
        where: list[int] = []
        for i in range(n):
            words = rng.choices(self.lexicon, k=rng.randint(4, 32))
            ids[i] = np.resize(words, width)
            where += range(i * width + len(words) - 1, (i + 1) * width - 1)
        return self._bare("copy", SMALL, ids, [], (0, 0), where)

    def _names(self, rng: random.Random, layout: Layout, n: int, width: int = 200) -> Batch:
        """Beginnings of stories behind a piece of the picture; only the names must be right.

        The piece has a random length: finding a name among few visual tokens comes first.
        """
        visual = num_visual(layout)
        length = rng.randint(0, visual)
        start = rng.randint(0, visual - length)
        rows = [self.story_row(rng, layout, 1) for _ in range(n)]
        head = [1, self.tok.user] + [-1] * length
        ids = np.zeros((n, len(head) + width), np.int64)
        where: list[int] = []
        for i, (_, asks) in enumerate(rows):
            t = self.turns(asks, True)[0][:width]
            ids[i] = head + t + [0] * (width - len(t))
            where += [i * ids.shape[1] + len(head) + j for j in self._learn(t)
                      if j + 1 < len(t) and t[j + 1] in self.names]
        b = self._bare("names", layout, ids, list(range(2, len(head))), (start, start + length), where)
        b.px = self._px(rows)
        return b

    @staticmethod
    def _bare(kind: str, layout: Layout, ids: np.ndarray, at: list[int], piece: tuple[int, int], where: list[int]) -> Batch:
        w = torch.tensor(where)
        flat = torch.from_numpy(ids).flatten()
        return Batch(kind, layout, 1 if at else 0, None, None, torch.from_numpy(ids), torch.tensor(at, dtype=torch.long),
                     piece, None, w, flat[w + 1], torch.arange(len(where)), torch.full((len(where),), -1))


# ----------------------------------------------------------------------------- the mix
def choose(done: float, vision_part: float, rng: random.Random) -> tuple[str, Layout, int]:
    """Kind, layout and pictures of the next batch, at ``done`` of the whole run."""
    def layout(names: str, weights: list[float]) -> Layout:
        return LAYOUTS[rng.choices(names.split(), weights)[0]]

    every = "4x4 4x3 3x4 6x4 4x6 6x6 6x5 8x6 8x8"
    if done < vision_part:
        return "patch", layout(every, [6, 1, 1, 1, 1, 1, 1, 0.5, 0.5]), 1
    late = (done - vision_part) / (1 - vision_part)
    if late < 0.08:
        kind = rng.choices(("qa", "names", "copy"), (0.7, 0.2, 0.1))[0]
    elif late < 0.2:
        kind = rng.choices(("qa", "names", "copy", "multi", "story", "chat"), (0.52, 0.1, 0.02, 0.14, 0.12, 0.1))[0]
    else:
        kind = rng.choices(("qa", "names", "multi", "chat", "story", "saga"), (0.38, 0.03, 0.25, 0.14, 0.11, 0.09))[0]
    wide = min(1.0, late / 0.25)  # larger pictures come in slowly
    if kind == "qa":
        return kind, layout(every, [5, 0.7, 0.7, *(wide * x for x in (1, 1, 1, 0.8, 0.6, 0.8))]), 1
    if kind in ("names", "copy"):
        return kind, SMALL, 1
    if kind in ("multi", "saga"):
        many = rng.choice((2, 2, 3))
        return kind, SMALL if many == 3 else layout("4x4 4x3 3x4 6x4", [6, 0.5, 0.5, wide]), many
    if kind == "chat":
        many = rng.choice((1, 1, 2, 3))
        return kind, layout(every, [5, 0.7, 0.7, *(wide * x for x in (1, 1, 0.6, 0.4, 0.3, 0.3))]) if many == 1 else SMALL, many
    return kind, layout("4x4 4x3 3x4 6x4 6x6", [6, 0.5, 0.5, wide, wide]), 1


class Stream(IterableDataset):
    """Endless batches; ``done`` (one number) and ``weight`` (one per task) are shared with the trainer."""

    def __init__(self, maker: Maker, vision_part: float, seed: int, done: Tensor, weight: Tensor) -> None:
        self.maker, self.vision_part, self.seed, self.done, self.weight = maker, vision_part, seed, done, weight

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        rng = random.Random(f"{self.seed} {info.id if info else 0}")
        while True:
            done = float(self.done)
            kind, layout, pictures = choose(done, self.vision_part, rng)
            weight = dict(zip(TASKS, self.weight.tolist()))
            easy = rng.random() < 0.7 - 7 * (done - self.vision_part)  # few objects first
            yield self.maker.make(kind, rng.getrandbits(60), layout, pictures, weight=weight, easy=easy)


def _quiet(_: int) -> None:
    """A SIGTERM to the group is for the trainer, which saves and then ends its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stream(maker: Maker, vision_part: float, seed: int, done: Tensor, weight: Tensor, workers: int, pin: bool
           ) -> Iterator[Batch]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data = Stream(maker, vision_part, seed, done, weight)
    return iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=3 if workers else None,
                           pin_memory=pin, worker_init_fn=_quiet))
