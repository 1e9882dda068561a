"""What models/train/stories.py finds in stories, right ones and damaged ones: python make.py

Writes facts.json: texts with the statements that story_facts finds, the facts that the story's
question asks for, and score_story's counts.  Needs the Python standard library alone.
"""
import json
import random
import sys
import types
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "models/train"))
try:
    import stories
except ModuleNotFoundError:  # world.py draws with numpy; its words need none
    sys.modules["numpy"] = types.ModuleType("numpy")
    import stories
from scoring import score_story

rng = random.Random(4)
ODD = ["Café", "no", "nothing", "saw", "Leo", "Leopard", "red", "reddish", "row 1, column ٣", "the", "below",
       "on the right", "character Q", "character q", "Nora the blue ring", "big", "bigger", "of picture 12", "_red_", "red-blue"]


def damaged(text):
    """Words swapped, dropped, and put in."""
    words = text.split(" ")
    for _ in range(12):
        k = rng.randrange(len(words))
        match rng.randrange(4):
            case 0:
                words[k] = rng.choice(ODD)
            case 1:
                words.insert(k, rng.choice(ODD))
            case 2:
                del words[k]
            case 3:
                j = rng.randrange(len(words))
                words[k], words[j] = words[j], words[k]
    return " ".join(words)


out = []
for row in [json.loads(x) for x in (ROOT / "tests/eval/small-phi3v/dev/story.jsonl").read_text().splitlines()][::4]:
    for text in (row["reference"], damaged(row["reference"]), damaged(damaged(row["reference"]))):
        out.append({"id": row["id"], "text": text, "statements": [list(f) for f in stories.story_facts(text)],
                    "score": score_story(text, row["facts"])})
(HERE / "facts.json").write_text("[\n" + ",\n".join(json.dumps(x) for x in out) + "\n]\n")
