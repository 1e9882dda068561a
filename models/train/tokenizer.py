"""A llama-style SentencePiece BPE on the generated text, plus the Phi-3 special tokens."""
from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

import asking
import stories
from world import LAYOUTS, make_scene

SPECIAL = ["<|endoftext|>", "<|assistant|>", *(f"<|placeholder{i}|>" for i in range(1, 5)), "<|system|>",
           "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
           *(f"<|placeholder{i}|>" for i in range(7, 40)), "<|image|>"]  # offsets as in Phi-3.5-vision
FILES = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
EXTRA = 64  # rows of the embedding beyond the SentencePiece vocabulary
TEMPLATE = ("{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + "
            "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' "
            "%}{{- '<|assistant|>\n' -}}{% endif %}")


def corpus(seed: int, count: int) -> list[str]:
    """Lines to learn pieces from: everything the generators say."""
    rng, shapes = random.Random(seed), list(LAYOUTS.values())
    out: list[str] = []
    for i in range(count):
        pair = [make_scene(seed + 2 * i + j, rng.choice(shapes)) for j in (0, 1)]
        casts = [stories.make_cast(s, rng, 4) for s in pair]
        many = rng.random() < 0.2
        texts = [stories.story_question(casts[:1 + many]), stories.story(pair, casts[:1 + many])]
        asks = asking.pick(asking.questions(pair[0], rng), 12, rng) + asking.pick(asking.multi_questions(pair, rng), 6, rng)
        asks += [asking.ask_caption(pair[0]), *asking.chat_turns(pair, rng, 4)]
        texts += [x for q in asks for x in (q.question, "\n" + q.question, q.answer)]
        out += [x for t in texts for x in (t.split("\n") if not t.startswith("\n") else [t[1:]])]
    return out


def build(out: Path, size: int = 960) -> None:
    lines = corpus(10**9, 3000)
    blob = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=blob, vocab_size=size, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, add_dummy_prefix=True,
        required_chars="".join(chr(c) for c in range(33, 127)), character_coverage=1.0,
        minloglevel=2, num_threads=2)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(blob.getvalue())
    sp = spm.SentencePieceProcessor(model_proto=blob.getvalue())
    pieces = [sp.id_to_piece(i) for i in range(size)]
    vocab = {p: i for i, p in enumerate(pieces)}
    merges = []
    for p in sorted((p for i, p in enumerate(pieces) if i >= 259 and len(p) > 1), key=lambda p: -sp.get_score(vocab[p])):
        pairs = [(p[:i], p[i:]) for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
        merges += sorted(pairs, key=lambda x: (vocab[x[0]], vocab[x[1]]))
    t = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    base = [AddedToken("<unk>", normalized=False), AddedToken("<s>", normalized=False),
            AddedToken("</s>", normalized=False, rstrip=True)]
    added = [AddedToken(s, normalized=False, rstrip=s != "<|endoftext|>") for s in SPECIAL]
    t.add_special_tokens(base + added)
    t.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    t.save(str(out / "tokenizer.json"))

    def write(name: str, value: object) -> None:
        (out / name).write_text(json.dumps(value, indent=2) + "\n")

    every = {i: a for i, a in enumerate(base)} | {size + i: a for i, a in enumerate(added)}
    write("added_tokens.json", {s: size + i for i, s in enumerate(SPECIAL)})
    write("special_tokens_map.json", {"bos_token": "<s>", "eos_token": "<|endoftext|>",
                                      "pad_token": "<|endoftext|>", "unk_token": "<unk>"})
    write("tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False, "legacy": True, "model_max_length": 131072,
        "added_tokens_decoder": {str(i): {"content": a.content, "lstrip": False, "normalized": False,
                                          "rstrip": a.rstrip, "single_word": False, "special": True}
                                 for i, a in every.items()},
        "bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>",
        "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False, "padding_side": "right",
        "processor_class": "Phi3VProcessor", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False})
    bad = sum(t.encode(line, add_special_tokens=False).ids != sp.encode(line) for line in lines[:4000])
    if bad:
        raise SystemExit(f"tokenizer.json and tokenizer.model differ on {bad} of 4000 lines")


class Tok:
    """tokenizer.json plus the Phi-3.5-vision prompt rule (each text chunk starts with <s>)."""

    def __init__(self, folder: Path) -> None:
        self.t = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for name in ("assistant", "end", "user", "image", "endoftext"):
            setattr(self, name, self.t.token_to_id(f"<|{name}|>"))
        self.vocab = self.endoftext + EXTRA

    assistant: int
    end: int
    user: int
    image: int
    endoftext: int

    def prompt(self, text: str, image_tokens: list[int]) -> list[int]:
        """Token ids; image k is image_tokens[k-1] times the id -k (as the HF processor has it)."""
        ids: list[int] = []
        for part in re.split(r"(<\|image_\d+\|>)", text):
            m = re.fullmatch(r"<\|image_(\d+)\|>", part)
            if m:
                ids += [-int(m[1])] * image_tokens[int(m[1]) - 1]
            elif part:
                ids += self.t.encode(part).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.t.decode([i for i in ids if i >= 0], skip_special_tokens=True)


def chat(question: str, images: int = 1) -> str:
    pics = "".join(f"<|image_{k}|>\n" for k in range(1, images + 1))
    return f"<|user|>\n{pics}{question}<|end|>\n<|assistant|>\n"


if __name__ == "__main__":
    import sys
    build(Path(sys.argv[1]))
