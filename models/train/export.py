"""Write the Hugging Face directory (fp16 safetensors) from a training run: python export.py RUN OUT"""
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from preprocess import MEAN, STD
from tokenizer import Tok


def write_json(path: Path, value: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n")


def checkpoint(run: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    saved = torch.load(run / "last.pt", map_location="cpu")
    weights = {k.removeprefix("model."): v.to(torch.float16).contiguous()
               for k, v in saved["net"].items() if k.startswith("model.")}
    bad = [k for k, v in weights.items() if not torch.isfinite(v).all()]
    if bad:
        raise SystemExit(f"{run / 'last.pt'}: not finite in fp16: {', '.join(bad)}")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    cfg = saved["config"]
    write_json(out / "config.json", cfg)
    for f in (run / "tok").iterdir():
        shutil.copy(f, out / f.name)
    tok = Tok(out)
    write_json(out / "generation_config.json", {
        "bos_token_id": 1, "eos_token_id": [tok.end, tok.assistant, tok.endoftext],
        "pad_token_id": tok.endoftext, "do_sample": False})
    write_json(out / "preprocessor_config.json", {
        "image_processor_type": "Phi3VImageProcessor", "processor_class": "Phi3VProcessor",
        "do_convert_rgb": True, "image_mean": MEAN, "image_std": STD, "num_crops": 4,
        "num_img_tokens": cfg["img_processor"]["num_img_tokens"], "image_size": cfg["img_processor"]["image_size"]})


if __name__ == "__main__":
    checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
