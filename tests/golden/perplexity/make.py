"""Writes golden.json and q8_0.base with llama.cpp's own llama-perplexity.

    python make.py PATH/TO/llama-perplexity

These were made with the perplexity.cpp of llama-cpp-python 0.3.36's llama.cpp, compiled against the
unpatched llama.cpp of llama-cpp-sys-2 0.1.161, on a CPU with AVX-512.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MODELS = HERE.parent.parent.parent / "models"


def run(model, *args):
    command = [sys.argv[1], "-m", str(MODELS / f"small-phi3v-{model}.gguf"), "-t", "1", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.\d+", text)]


def predict(model, c, chunks, base):
    """The perplexity up to each chunk, the last with its error."""
    text = run(model, "-f", str(HERE / "text.txt"), "-c", c, "-b", c, "--chunks", chunks, "--save-all-logits", base)
    return {
        "chunks": numbers(re.search(r"^\[1\].*$", text, re.M)[0]),
        "final": numbers(re.search(r"Final estimate: PPL = (.*)", text)[1]),
    }


def compare(model, c, base):
    """Each line's numbers by its name; Δp and shares are in percent."""
    text = run(model, "-c", c, "-b", c, "--kl-divergence", "--kl-divergence-base", base)
    lines = re.findall(r"^ *([A-Z0-9][^:\n]*?) *: +(-?\d.*)$", text, re.M)
    rows = re.findall(r"^ +\d+ +(\d.*±.*)$", text, re.M)
    wanted = ("PPL", "KLD", "Δp", "top p")
    found = {re.sub(" +", " ", name): numbers(value) for name, value in lines if any(w in name for w in wanted)}
    return {"chunks": [numbers(row) for row in rows], **found}


with tempfile.TemporaryDirectory() as folder:
    base = f"{folder}/base"
    golden = {
        "c128": predict("Q8_0", "128", "5", base),
        "c128_q4_k_m": compare("Q4_K_M", "128", base),
    }
    base = str(HERE / "q8_0.base")
    golden["c16"] = predict("Q8_0", "16", "3", base)
(HERE / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
