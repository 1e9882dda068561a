"""Checks of the generators and of the model's training paths against plainer ones: pytest test_train.py"""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adaptive
import asking
import stories
from batches import Maker
from draw import boxes, draw, num_visual, patch_labels, pixels, token_cells, tokens_of
from learner import Learner
from model import Attention, Phi3V, default_config
from packed import error
from preprocess import hd_image, num_image_tokens
from scoring import score_story, turns_of, wilson
from table import table
from tokenizer import Tok, chat
from world import COLORS, LAYOUTS, SHAPES, make_scene

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "small-phi3v"


@pytest.fixture(scope="module")
def tok() -> Tok:
    return Tok(CHECKPOINT)


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


def test_answers_behind_a_prompt_that_is_partly_hidden() -> None:
    torch.manual_seed(0)
    net, ids = Phi3V(default_config(layers=2)).eval(), [5, 9, 11, 2]
    sees = torch.ones(2, 20, dtype=torch.bool)
    sees[1, 3:9] = False
    with torch.no_grad():
        x = torch.randn(1, 20, 256)
        past = net.hidden(x)[1]
        whole = net.lm_head(net.hidden(torch.cat([x, net.embed(torch.tensor([ids]))], 1))[0])[0, 20:]
        got = adaptive.behind(net, past, ids, sees)
        for kv in past:
            for z in kv:
                z[:, :, 3:9] += 1
        again = adaptive.behind(net, past, ids, sees)
    assert torch.allclose(got[0], whole, atol=1e-4)
    assert torch.equal(got[1], again[1]) and not torch.allclose(got[0], again[0], atol=1e-2)


def test_how_many_tokens_each_rule_keeps() -> None:
    a = torch.tensor([1.0, 4.0, 2.0, 1.0])  # mean 2, squares 22: spread over 64 / 22
    want = {("keep", 0.5): 2, ("top-p", 0.7): 2, ("top-p", 0.8): 3, ("tau", 1.0): 2, ("tau", 0.4): 4,
            ("entropy", 1.0): 3, ("spread", 1.0): 3, ("spread", 0.5): 1, ("spread", 9.0): 4, ("spread", 0.0): 1}
    assert {k: adaptive.count(*k, a) for k in want} == want
    assert adaptive.count("spread", 1.0, torch.ones(7)) == adaptive.count("entropy", 1.0, torch.ones(7)) == 7


def test_packed_attention_and_its_gradient() -> None:
    assert error(torch.device("cpu"), torch.float32) < 1e-5


@pytest.mark.parametrize("kind, pictures", [("patch", 1), ("copy", 1), ("names", 1), ("qa", 1), ("multi", 2), ("chat", 3), ("story", 1)])
def test_every_kind_of_batch_trains(tok: Tok, kind: str, pictures: int) -> None:
    torch.manual_seed(0)
    net = Learner(default_config(layers=3, vision_layers=2, vocab=tok.vocab))
    result = net(Maker(tok, 100).make(kind, 1, pictures=pictures, n=2), 0.3)
    result.loss.backward()
    assert torch.isfinite(result.loss) and all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


# ----------------------------------------------------------------------------- the trainer as a program
QUICK = ["--layers", "3", "--vision-layers", "2", "--tokens", "600", "--accumulate", "1", "--workers", "1", "--watch-scale", "0.01",
         "--device", "cpu", "--show", "1"]


def program(name: str, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, HERE / name, *words], capture_output=True, text=True, env=os.environ | more, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, from nothing."""
    out = tmp_path_factory.mktemp("train") / "run"
    done = program("train.py", "--out", out, "--minutes", "60", "--steps", "3", *QUICK)
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_goes_on_where_it_was(run: Path) -> None:
    before = torch.load(run / "last.pt")
    done = program("train.py", "--out", run, "--minutes", "60", "--steps", "5", "--resume", "--device", "cpu", "--tokens", "600",
                   "--accumulate", "1", "--workers", "1", "--watch-scale", "0.01", "--show", "1")
    assert done.returncode == 0, done.stderr
    after = torch.load(run / "last.pt")
    assert (before["step"], after["step"]) == (3, 5) and after["spent"] > before["spent"] > 0
    assert after["opt"]["count"] == 5 and after["config"]["num_hidden_layers"] == 3
    again = program("train.py", "--out", run, "--minutes", "60")
    assert again.returncode and "--resume" in again.stderr


def test_sigterm_saves(run: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "train.py"), "--out", str(tmp_path), "--minutes", "60", "--vision-part", "0", *QUICK]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        line = next(x for x in trainer.stdout if " step " in x)
        began = time.monotonic()
        trainer.send_signal(signal.SIGTERM)
        assert trainer.wait(120) == 0 and time.monotonic() - began < 60
    saved = torch.load(tmp_path / "last.pt")
    assert saved["step"] >= int(line.split(" step ")[1].split()[0])


def test_a_published_checkpoint_is_a_beginning(tmp_path: Path) -> None:
    """With no time left nothing is learned, so what is exported is what was given."""
    done = program("train.py", "--out", tmp_path / "run", "--minutes", "0", "--from", CHECKPOINT, *QUICK)
    assert done.returncode == 0, done.stderr
    assert program("export.py", tmp_path / "run", tmp_path / "hf").returncode == 0
    for file in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "hf" / file).read_bytes() == (CHECKPOINT / file).read_bytes()
    given, back = (load_file(x / "model.safetensors") for x in (CHECKPOINT, tmp_path / "hf"))
    assert given.keys() == back.keys() and all(torch.equal(given[k], back[k]) for k in given)
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads((CHECKPOINT / "config.json").read_text())


def test_answers_of_the_runtime_are_kept(tmp_path: Path) -> None:
    """score_gguf.py against a stand-in for `hae` that knows the answers, but for one; begun twice."""
    rows = [json.loads(x) for x in (HERE.parents[1] / "tests/eval/small-phi3v/test/understanding.jsonl").read_text().splitlines()][::100]
    folder, log = tmp_path / "set", tmp_path / "asked"
    folder.mkdir()
    (folder / "understanding.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for part in ("chat", "story"):
        (folder / f"{part}.jsonl").write_text("")
    know = {r["prompt"] + r["images"][0]: (r["num_crops"], r["answer"] if i else "no") for i, r in enumerate(rows)}
    (tmp_path / "know.json").write_text(json.dumps(know))
    fake = tmp_path / "hae"
    fake.write_text(f"""#!{sys.executable}
import json, os, sys
w = sys.argv
get = lambda flag: w[w.index(flag) + 1]
open({str(log)!r}, "a").write("x")
if os.environ.get("FAIL") and os.path.getsize({str(log)!r}) == 4:
    sys.exit("out of order")
crops, text = json.load(open({str(tmp_path / "know.json")!r}))[get("-p") + "images/" + os.path.basename(get("--image"))]
assert int(get("--num-crops")) == crops and get("--temp") == "0" and "--no-conversation" in w and "--kv-policy" in w
cells = dict(live=dict(text=20, vision=40), binned=dict(text=0, vision=10), peak=120)
print(json.dumps(dict(text=" " + text, finish="eog", tokens=dict(prompt=dict(text=16, vision=100), generated=4), kv=dict(cells=cells))))
""")
    fake.chmod(0o755)
    words: list[str | Path] = ["-m", fake, "--mmproj", fake, "--hae", fake,
                               "--answers", tmp_path / "a.jsonl", "--out", tmp_path / "scores.json"]
    failed = program("score_gguf.py", folder, *words, "--", "--kv-policy", "hae", FAIL="1")
    assert failed.returncode and "out of order" in failed.stderr
    with (tmp_path / "a.jsonl").open("a") as f:
        f.write('{"id": "u0')  # as if it had been killed there
    done = program("score_gguf.py", folder, *words, "--", "--kv-policy", "hae")
    assert done.returncode == 0, done.stderr
    assert log.stat().st_size == len(rows) + 1  # the failed one twice, no other
    got = json.loads((tmp_path / "scores.json").read_text())["understanding"]
    assert got["n"] == len(rows) and got["wrong"] == [rows[0]["id"]]
    assert got["cells"] == {"end": 0.5833, "most": 1.0, "visual": 0.5}
    other = program("score_gguf.py", folder, *words, "--", "--kv-policy", "full")
    assert other.returncode and "options" in other.stderr


def test_the_models_readme_has_the_table_of_the_kept_scores() -> None:
    readme = (HERE.parent / "README.md").read_text()
    paths = {"PyTorch F32": HERE.parents[1] / "tests/eval/small-phi3v/test/scores.json", "Q8_0": HERE / "results/Q8_0.json",
             "Q4_K_M": HERE / "results/Q4_K_M.json", "Q8_0, `hae`": HERE / "results/Q8_0-hae.json"}
    assert table({name: json.loads(path.read_text()) for name, path in paths.items()}) in readme


def test_wilson() -> None:
    low, high = wilson(90, 100)
    assert abs(low - 0.8256) < 1e-3 and abs(high - 0.9448) < 1e-3  # textbook values
