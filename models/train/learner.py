"""The model at work on batches: loss, right answers, and the patch questions to the tower."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asking import TASKS
from batches import Batch
from draw import HEADS, token_cells
from model import Phi3V
from preprocess import crops


@dataclass
class Result:
    loss: Tensor        # scalar
    right: Tensor       # [len(TASKS)] answers that are right in every token
    asked: Tensor       # [len(TASKS)]
    hits: Tensor        # learned tokens that were right, scalar
    patch: Tensor | None  # [len(HEADS)] accuracy on tokens that show something
    place: Tensor | None  # loss of the place questions


PLACES, PLACE_LAYER = (8, 8, 3), 2  # rows, columns, pictures; asked behind this layer of the decoder


class Learner(nn.Module):
    """The model and two linear heads that are dropped after training.

    ``aux`` asks the visual tokens what they show, ``place`` asks them, a few layers into the
    decoder, in which cell of which picture they are: the tower sees single crops and cannot know.
    """

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.model = Phi3V(cfg)
        self.aux = nn.Linear(cfg["hidden_size"], sum(HEADS.values()))
        self.place = nn.Linear(cfg["hidden_size"], sum(PLACES))
        self._cells: dict[tuple[str, int], Tensor] = {}

    def speed_up(self) -> None:
        """Compile the layers (one graph for all of a kind)."""
        for layer in [*self.model.model.layers, *self.model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers]:
            layer.compile(dynamic=True)

    def look(self, b: Batch) -> Tensor | None:
        """Visual tokens [pictures of the batch, tokens, h]."""
        if b.px is None:
            return None
        px, rows, cols = crops(b.px)
        return self.model.images(px, rows, cols)

    def patch_loss(self, image: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the questions of the cross-entropy; empty tokens count less, as there are many."""
        logits = self.aux(F.rms_norm(image.float(), (image.shape[-1],))).float()
        shows = patch[..., 0] != HEADS["color"] - 1
        loss, score, i = image.new_zeros((), dtype=torch.float32), [], 0
        for h, size in enumerate(HEADS.values()):
            y = patch[..., h]
            w = torch.where(shows, 1.0, 0.1) * (y >= 0)
            ce = F.cross_entropy(logits[..., i:i + size].flatten(0, -2), y.flatten(), reduction="none", ignore_index=-1)
            loss = loss + (ce * w.flatten()).sum() / w.sum()
            there = shows & (y >= 0)
            score.append(((logits[..., i:i + size].argmax(-1) == y) & there).sum() / there.sum().clamp(min=1))
            i += size
        return loss / len(HEADS), torch.stack(score)

    def place_loss(self, state: Tensor, b: Batch) -> Tensor:
        """state [n, t, h] behind PLACE_LAYER."""
        key = b.layout.name, b.pictures
        if key not in self._cells:
            one = torch.from_numpy(token_cells(b.layout))
            which = [torch.where(one[:, :1] < 0, -1, k) for k in range(b.pictures)]
            self._cells[key] = torch.cat([torch.cat([one, w], 1) for w in which]).to(state.device)
        y = self._cells[key].unsqueeze(0).expand(len(state), -1, -1)
        x = state.index_select(1, b.at).float()
        parts = self.place(F.rms_norm(x, (x.shape[-1],))).float().split(PLACES, -1)
        return sum(F.cross_entropy(p.flatten(0, 1), y[..., i].flatten(), ignore_index=-1)
                   for i, p in enumerate(parts)) / len(PLACES)  # type: ignore[return-value]

    def logits(self, b: Batch, image: Tensor | None, states: list[Tensor] | None = None) -> Tensor:
        """[m, vocabulary] at the positions that are learned."""
        net = self.model
        if image is None:
            x = net.embed(b.ids)
        else:
            image = image[:, b.piece[0]:b.piece[1]].reshape(len(b.ids), -1, image.shape[-1])
            x = net.embed_at(b.ids, image, b.at)
        h, _ = net.hidden(x, pack=b.pack, states=states)
        return net.lm_head(h.flatten(0, 1).index_select(0, b.where)).float()

    def forward(self, b: Batch, patch_weight: float) -> Result:
        image = self.look(b)
        loss, patch, place = torch.zeros((), device=b.where.device), None, None
        if image is not None and b.patch is not None and patch_weight:
            part, patch = self.patch_loss(image, b.patch)
            loss = loss + patch_weight * part
        right = asked = torch.zeros(len(TASKS), device=b.where.device)
        hits = torch.zeros((), device=b.where.device)
        if b.kind != "patch":
            states: list[Tensor] = []
            logits = self.logits(b, image, states)
            if b.patch is not None and patch_weight:
                place = self.place_loss(states[PLACE_LAYER], b)
                loss = loss + patch_weight * place
            loss = loss + F.cross_entropy(logits, b.target)
            with torch.no_grad():
                miss = logits.argmax(-1) != b.target
                hits = (~miss).float().mean()
                wrong = torch.zeros(len(b.task), device=miss.device).index_add_(0, b.answer, miss.float())
                slot = torch.where(b.task < 0, len(TASKS), b.task)
                zero = torch.zeros(len(TASKS) + 1, device=miss.device)
                right = zero.index_add(0, slot, (wrong == 0).float())[:-1]
                asked = zero.index_add(0, slot, torch.ones_like(wrong))[:-1]
        return Result(loss, right, asked, hits, patch, place)
