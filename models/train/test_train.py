"""Checks of the generators and of the model's training paths against plainer ones: pytest test_train.py"""
from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import asking
import stories
from batches import Maker
from draw import boxes, draw, num_visual, patch_labels, pixels, token_cells, tokens_of
from learner import Learner
from model import Attention, Phi3V, default_config
from packed import error
from preprocess import hd_image, num_image_tokens
from scoring import score_story, turns_of, wilson
from tokenizer import Tok, chat
from world import COLORS, LAYOUTS, SHAPES, make_scene

TOKENIZER = Path(__file__).parent.parent / "small-phi3v"


@pytest.fixture(scope="module")
def tok() -> Tok:
    return Tok(TOKENIZER)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_drawn_picture_is_the_processors(name: str) -> None:
    layout = LAYOUTS[name]
    scene = make_scene(11, layout)
    assert (np.asarray(hd_image(draw(scene), layout.num_crops)) == pixels(scene)).all()
    assert num_visual(layout) == num_image_tokens(*layout.grid)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_that_show_an_object_have_its_color(name: str) -> None:
    """The middle of every labelled token's object has the object's colour, read from the pixels."""
    scene = make_scene(23, LAYOUTS[name])
    art = np.asarray(draw(scene)).astype(int)
    labels = patch_labels(scene)
    for t, box in zip(scene.things, boxes(scene)):
        x0, y0, x1, y1 = (int(v) for v in box)
        patch = art[y0:y1, x0:x1].reshape(-1, 3)
        near = (abs(patch - np.array(COLORS[t.color])).max(1) <= 8).mean()
        assert near > 0.1, t
        mine = tokens_of(scene.layout, [box])
        assert ((labels[mine, 0] == list(COLORS).index(t.color)) & (labels[mine, 1] == SHAPES.index(t.shape))).any(), t


def test_cells_of_tokens() -> None:
    cells = token_cells(LAYOUTS["6x5"])
    assert Counter(map(tuple, cells[cells[:, 0] >= 0][:18 * 19].tolist()))[2, 3] >= 9
    assert cells[:, 0].max() == 4 and cells[:, 1].max() == 5


def test_answers_are_true() -> None:
    """Recompute some answers from the objects alone."""
    rng = random.Random(5)
    for seed in range(40):
        scene = make_scene(seed, LAYOUTS["6x6"])
        for q in asking.questions(scene, rng):
            if q.task == "where":
                name = q.question.removeprefix("Where is the ").rstrip("?")
                t = next(t for t in scene.things if t.name == name)
                assert q.answer == f"Row {t.row + 1}, column {t.col + 1}"
            if q.task == "relation" and "left of" in q.question:
                t = next(t for t in scene.things if t.name in q.question)
                left = [o for o in scene.things if o.row == t.row and o.col < t.col]
                assert q.answer.lower() == (max(left, key=lambda o: o.col).name if left else "nothing")


def test_a_story_states_its_own_facts() -> None:
    rng = random.Random(3)
    scenes = [make_scene(100 + k) for k in range(3)]
    casts: list[stories.Cast] = []
    for s in scenes:
        casts.append(stories.make_cast(s, rng, 4, {n for c in casts for n, _, _ in c}))
    text = stories.story(scenes, casts)
    facts = [{"name": n, "attribute": a, "value": v, "mentions": c}
             for (n, a, v), c in Counter(stories.story_facts(text)).items()]
    whole = score_story(text, facts)
    assert whole["made"] == whole["required"] == whole["said"] == whole["true"] > 200
    name, thing, _ = casts[0][0]
    other = "red" if thing.color != "red" else "blue"
    wrong = score_story(text.replace(f"{name} was the {thing.color}", f"{name} was the {other}", 1), facts)
    assert wrong["made"] == whole["made"] - 1 and wrong["true"] == whole["true"] - 1


def test_training_turns_are_the_chat_template(tok: Tok) -> None:
    maker, rng = Maker(tok, 100), random.Random(1)
    scenes = [make_scene(7), make_scene(8)]
    asks = asking.chat_turns(scenes, rng, 5)
    turns = [{"task": q.task, "question": q.question, "answer": q.answer} for q in asks]
    last = turns_of([{"id": "c", "prompt": chat(asks[0].question, 2), "turns": turns}])[-1]
    want = tok.prompt(last["prompt"] + last["answer"] + "<|end|>", [199, 199])
    assert maker.head(scenes[0].layout, 2) + sum(maker.turns(asks, False), []) == want


def test_a_pack_is_its_questions_alone() -> None:
    torch.manual_seed(0)
    net = Phi3V(default_config(layers=2)).eval()
    x = torch.randn(2, 20 + 3 * 8, 256)
    with torch.no_grad():
        for Attention.flash in (True, False):
            packed, _ = net.hidden(x, pack=(20, 3, 8))
            for j in range(3):
                part = slice(20 + 8 * j, 28 + 8 * j)
                alone, _ = net.hidden(torch.cat([x[:, :20], x[:, part]], 1))
                assert torch.allclose(packed[:, part], alone[:, 20:], atol=1e-5)
    Attention.flash = True


def test_packed_attention_and_its_gradient() -> None:
    assert error(torch.device("cpu"), torch.float32) < 1e-5


@pytest.mark.parametrize("kind, pictures", [("patch", 1), ("copy", 1), ("names", 1), ("qa", 1), ("multi", 2), ("chat", 3), ("story", 1)])
def test_every_kind_of_batch_trains(tok: Tok, kind: str, pictures: int) -> None:
    torch.manual_seed(0)
    net = Learner(default_config(layers=3, vision_layers=2, vocab=tok.vocab))
    result = net(Maker(tok, 100).make(kind, 1, pictures=pictures, n=2), 0.3)
    result.loss.backward()
    assert torch.isfinite(result.loss) and all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_wilson() -> None:
    low, high = wilson(90, 100)
    assert abs(low - 0.8256) < 1e-3 and abs(high - 0.9448) < 1e-3  # textbook values
