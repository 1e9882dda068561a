"""Writes the seeds that hae does not make itself (`src/seeds.rs` makes those), from the fixtures of the tests:

    pip install pillow==13.0.0
    python3 fuzz/make.py

and `convert/`, a Phi-3.5-vision directory as small as can be.
"""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parent
TINY = ROOT / "models/tiny-phi3v"
CONVERT = HERE / "convert"


def seed(target, name, data):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def pictures():
    base = Image.new("RGB", (12, 7))
    base.putdata([(x * 20, y * 30, (x * y * 7) % 256) for y in range(7) for x in range(12)])

    def saved(name, image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        seed("picture", name, out.getvalue())

    for mode in ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"]:
        image = base.convert("L").convert("I").convert("I;16") if mode == "I;16" else base.convert(mode)
        saved(f"{mode.replace(';', '')}.png", image, "PNG")
    saved("transparent.png", base.convert("P"), "PNG", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    saved("turned.jpg", base, "JPEG", exif=exif)
    saved("progressive.jpg", base, "JPEG", progressive=True)
    saved("gray.jpg", base.convert("L"), "JPEG")
    saved("cmyk.jpg", base.convert("CMYK"), "JPEG")
    saved("restarts.jpg", base.resize((40, 40)), "JPEG", restart_marker_blocks=1)
    saved("lossy.webp", base, "WEBP", exif=exif)
    saved("lossless.webp", base.convert("RGBA"), "WEBP", lossless=True)
    saved("moving.webp", base, "WEBP", save_all=True, append_images=[base.rotate(180)])
    saved("still.gif", base.convert("P"), "GIF")
    saved("moving.gif", base.convert("P"), "GIF", save_all=True, append_images=[base.rotate(180).convert("P")])
    for mode in ["RGB", "RGBA", "L", "P", "1"]:
        saved(f"{mode}.bmp", base.convert(mode), "BMP")
    # Interlaced, which Pillow does not write: one pass of the first pixel, and of the others.
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"\0\x10" + b"\0\x20" + b"\0\x30\x40"
    seed("picture", "interlaced.png", b"\x89PNG\r\n\x1a\n"
         + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 1))
         + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    # Runs of BMP: two rows of eight.
    runs = b"\x08\x01\0\0\x03\x02\x05\x01\0\x01"
    palette = bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 255, 0, 0])
    head = struct.pack("<IiiHHIIiiII", 40, 8, 2, 1, 8, 1, len(runs), 0, 0, 3, 3)
    at = 14 + len(head) + len(palette)
    seed("picture", "runs.bmp", b"BM" + struct.pack("<IHHI", at + len(runs), 0, 0, at) + head + palette + runs)
    for name in ["animated.webp", "cmyk.jpg", "lossy.webp", "progressive.jpg", "turned.jpg"]:
        seed("picture", f"test-{name}", (ROOT / "tests/data" / name).read_bytes())


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def convert():
    shutil.rmtree(CONVERT, ignore_errors=True)
    CONVERT.mkdir()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)] + [(f"<0x{b:02X}>", 6) for b in range(256)]
    pieces += [("\u2581a", 1), ("a", 1)]
    model = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -i) + b"\x18" + varint(kind))
        for i, (text, kind) in enumerate(pieces))
    model += field(2, b"\x18\x02") + field(3, b"\x18\x01")
    first = len(pieces)
    added = {"<|endoftext|>": first, "<|assistant|>": first + 1, "<|end|>": first + 2}
    vocab = 272

    config = json.loads((TINY / "config.json").read_text())
    config.update(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                  intermediate_size=8, vocab_size=vocab, pad_token_id=first)
    config["rope_scaling"] = {"type": "su", "short_factor": [1.0, 1.1], "long_factor": [1.0, 2.5]}
    tower = config["img_processor"]
    tower.update(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                 image_size=28, patch_size=14, image_dim_out=8, num_img_tokens=1)
    processor = json.loads((TINY / "preprocessor_config.json").read_text())
    processor.update(image_size=28, num_img_tokens=1)
    tokenizer = json.loads((TINY / "tokenizer_config.json").read_text())
    tokenizer["added_tokens_decoder"] = {
        str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                 "special": True}
        for t, i in [("<unk>", 0), ("<s>", 1), ("</s>", 2), *added.items()]}
    for name in ["bos_token", "eos_token", "unk_token", "pad_token"]:
        tokenizer[name] = {"bos_token": "<s>", "unk_token": "<unk>"}.get(name, "<|endoftext|>")
    tokenizer["chat_template"] = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"

    sizes = {"norm": (8,), "embed_tokens": (vocab, 8), "lm_head": (vocab, 8)}
    text = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": sizes["embed_tokens"], "model.norm.weight": (8,), "lm_head.weight": (vocab, 8),
        text + "input_layernorm.weight": (8,), text + "post_attention_layernorm.weight": (8,),
        text + "self_attn.qkv_proj.weight": (16, 8), text + "self_attn.o_proj.weight": (8, 8),
        text + "mlp.gate_up_proj.weight": (16, 8), text + "mlp.down_proj.weight": (8, 8),
    }
    eyes = "model.vision_embed_tokens."
    clip = eyes + "img_processor.vision_model."
    tensors |= {
        eyes + "glb_GN": (1, 1, 32), eyes + "sub_GN": (1, 1, 1, 32),
        eyes + "img_projection.0.weight": (8, 32), eyes + "img_projection.0.bias": (8,),
        eyes + "img_projection.2.weight": (8, 8), eyes + "img_projection.2.bias": (8,),
        clip + "embeddings.class_embedding": (8,), clip + "embeddings.patch_embedding.weight": (8, 3, 14, 14),
        clip + "embeddings.position_embedding.weight": (5, 8),
    }
    for norm in ["pre_layrnorm", "post_layernorm", "encoder.layers.0.layer_norm1", "encoder.layers.0.layer_norm2"]:
        tensors |= {f"{clip}{norm}.weight": (8,), f"{clip}{norm}.bias": (8,)}
    for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]:
        tensors |= {f"{clip}encoder.layers.0.{part}.weight": (8, 8), f"{clip}encoder.layers.0.{part}.bias": (8,)}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        n = 2
        for side in shape:
            n *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    header = json.dumps(header, separators=(",", ":")).encode()
    safetensors = struct.pack("<Q", len(header)) + header + bytes(at)

    raw = {
        "vocab": {text: i for i, (text, _) in enumerate(pieces)}, "merges": ["\u2581 a"], "type": "BPE",
    }
    tokenizer_json = json.dumps({"version": "1.0", "added_tokens": [], "model": raw}, separators=(",", ":"))
    files = {
        "config.json": json.dumps(config),
        "preprocessor_config.json": json.dumps(processor),
        "tokenizer.model": model,
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": json.dumps(tokenizer),
        "added_tokens.json": json.dumps(added),
        "generation_config.json": json.dumps({"bos_token_id": 1, "eos_token_id": [first + 1, first, 2]}),
        "model.safetensors": safetensors,
    }
    for i, (name, data) in enumerate(files.items()):
        data = data if isinstance(data, bytes) else data.encode()
        seed("convert", name, bytes([i]) + data)
        # The target takes the vocabulary from tokenizer.model where that is not what is damaged.
        if name != "tokenizer.json":
            (CONVERT / name).write_bytes(data)


def templates():
    for path in sorted((ROOT / "tests/golden/chat").glob("*.jinja")):
        seed("template", path.stem, path.read_bytes())
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    for name, text in {
        "filters": "{{ messages | map(attribute='role') | join(', ') | upper | trim | tojson }}",
        "macro": "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages recursive %}{{ f(m.role) }}{{ loop.index }}{% endfor %}",
        "namespace": "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a ** 2 // 3 % 4 }}",
        "slices": "{{ messages[1:-1][::-1] }}{{ 'abc'[::2] }}{{ range(3) | list }}{{ [1,2] + [3] }}",
        "strings": "{{ 'a b'.split(' ')[0].startswith('a') }}{{ 'a' ~ 1 * 3 }}{{ strftime_now('%d %b %Y') }}",
        "raise": "{% if messages[0].role != 'user' %}{{ raise_exception('no: ' + messages[0].role) }}{% endif %}",
    }.items():
        text = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + text
        seed("template", name, text.encode() + b"\0" + json.dumps(messages).encode())


def grammars():
    schemas = [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}, "b": {"enum": ["x", None]}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1, "maxItems": 3, "$defs": {"n": {"type": "number"}}},
        {"anyOf": [{"type": "string", "pattern": "^a+$", "maxLength": 4}, {"const": 1.5}, {"type": "boolean"}]},
        {"type": "string", "format": "date"},
        {"allOf": [{"type": "object", "additionalProperties": {"type": "null"}}], "oneOf": [{}]},
    ]
    for i, schema in enumerate(schemas):
        seed("grammar", f"schema-{i}", b"\1" + json.dumps(schema).encode())
    gbnf = [
        'root ::= "Row " [1-8] ", column " [1-8]',
        'root ::= (expr "\\n")+\nexpr ::= term ([-+*/] term)*\nterm ::= [0-9]{1,3} | "(" expr ")" # end\n',
        'root ::= ws? [^"\\\\\\x00-\\x1F]* | "\\u00e9" .\nws ::= [ \\t\\n]{0,20}',
        'root ::= a{2} b{,3} c{2,}\na ::= "a"\nb ::= "b"\nc ::= "c" | ""',
    ]
    for i, text in enumerate(gbnf):
        seed("grammar", f"gbnf-{i}", b"\0" + text.encode())
    for i, text in enumerate(["a+b?[c-e]{2,3}(f|g)*", "(?i)x\\d\\w\\s.\\p{L}", "(?:a|bc)&~(d)"]):
        seed("grammar", f"regex-{i}", b"\2" + text.encode())
    lark = [
        'start: "a" b\nb: /[0-9]+/ | "x" b?\n',
        '%llguidance {}\nstart: t\nt[max_tokens=3, stop="!"]: /.*/\n%ignore /[ ]+/\nA: "a".."z"\n',
    ]
    for i, text in enumerate(lark):
        seed("grammar", f"lark-{i}", b"\3" + text.encode())


def questions():
    jsonl = [
        {"image": "a.png", "question": "Where is <|image_1|> it?", "answer": "Row 1", "task": "place"},
        {"id": 7, "images": [], "question": "Which?", "options": ["red", "blue"], "answer": "B", "num_crops": 4},
        {"question": "Read.", "answers": ["a", 3], "match": "anls"},
        {"question": "Hold.", "answer": "a", "wrong": ["b"], "match": "contains"},
        {"question": "Tell.", "facts": [{"name": "it", "attribute": "color", "value": "red", "mentions": 1}]},
        {"turns": [{"question": "One?", "answer": "1"}, {"question": "Two?", "answer": "2"}]},
    ]
    seed("questions", "jsonl", b"\0" + b"\n".join(json.dumps(row).encode() for row in jsonl if "image" not in row))
    seed("questions", "jsonl-free", b"\x82" + b'{"question": "a"}\r\n\r\n{"prompt": "<|user|>b"}')
    gqa = {"1": {"question": "Who?", "imageId": "n1", "answer": "girl", "isBalanced": True, "types": {"structural": "query"}}}
    seed("questions", "gqa", b"\1" + json.dumps(gqa).encode())
    science = {"3": {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "split": "test",
                     "task": "closed choice", "grade": "grade2", "subject": "social science", "topic": "geography"}}
    seed("questions", "scienceqa", b"\2" + json.dumps(science).encode())
    png = (HERE / "corpus/picture/1.png").read_bytes()
    import base64
    tsv = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit\n"
    tsv += "241\tWhich?\t\ta\tb\t\t\tB\tocr\t" + base64.b64encode(png).decode() + "\tx\ty\t\tdev\n"
    seed("questions", "mmbench", b"\3" + tsv.encode())
    seed("questions", "mmmu", b"\4" + (ROOT / "tests/data/mmmu.parquet").read_bytes())


def requests():
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
    png = (HERE / "corpus/picture/1.png").read_bytes()
    import base64
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}
    all_of = [
        (0, chat), (0, chat | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4}),
        (0, chat | {"temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["l"], "logprobs": True, "top_logprobs": 2, "n": 2}),
        (0, {"messages": [{"role": "user", "content": [shown, {"type": "text", "text": "?"}]}]}),
        (0, chat | {"tools": [tool], "tool_choice": "auto"}), (0, chat | {"tools": [tool], "tool_choice": "required", "stream": True}),
        (0, chat | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}}),
        (0, chat | {"hae": {"kv_policy": "hae", "kv_budget": 40}, "repeat_penalty": 1.1, "logit_bias": {"5": -1}}),
        (0, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "content": "7", "tool_call_id": "1"}]}),
        (1, {"prompt": ["a", [1, 2]], "max_tokens": 2, "echo": True, "logprobs": 1}), (1, {"prompt": "a", "stream": True, "suffix": None}),
        (2, {"prompt": [1, "a", 2], "n_predict": 3, "grammar": 'root ::= "a"', "cache_prompt": False, "id_slot": 1, "n_probs": 1}),
        (2, {"prompt": {"prompt_string": "<__media__>", "multimodal_data": [base64.b64encode(png).decode()]}, "stream": True, "samplers": ["top_k"], "json_schema": {}}),
        (4, {"input": "a", "instructions": "b", "max_output_tokens": 3}),
        (4, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}, {"type": "function_call_output", "call_id": "1", "output": "x"}], "stream": True, "tools": [{"type": "function", "name": "f", "parameters": {}}]}),
        (5, {"content": "aé", "add_special": True, "with_pieces": True}), (6, {"tokens": [104, 105, 256]}),
        (7, chat), (8, {}), (9, chat), (10, {"input": "a"}), (13, {"filename": "a.bin"}), (14, {}),
    ]
    for i, (path, body) in enumerate(all_of):
        seed("request", f"{i:02}", bytes([path]) + json.dumps(body).encode())


def dictionaries():
    words = {
        "template": "{% {%- %} -%} {{ }} {# #} for endfor if elif else endif set endset macro endmacro call filter raw endraw "
                    "loop.index loop.first loop.last messages content role tools tool_calls function arguments add_generation_prompt "
                    "bos_token eos_token namespace( raise_exception( strftime_now( tojson | selectattr( rejectattr( map( join( replace( "
                    "split( strip( items() is defined not in and or none true false [::-1] [:-1] range( ~ ** // generation",
        "grammar": 'root ::= | ( ) * + ? {2,3} [a-z] [^\\n] \\x41 \\u00e9 "a" # start: %llguidance %ignore %json %regex '
                   '"type" "object" "properties" "required" "items" "anyOf" "oneOf" "allOf" "$ref" "#/$defs/a" "enum" "const" "pattern" '
                   '"format" "minimum" "maxLength" "minItems" "additionalProperties" (?i) \\p{L} \\d',
        "request": '"messages" "role" "user" "assistant" "system" "tool" "content" "image_url" "text" "stream" "max_tokens" "n" "stop" '
                   '"temperature" "top_p" "top_k" "seed" "logprobs" "top_logprobs" "tools" "tool_choice" "response_format" "json_schema" '
                   '"grammar" "prompt" "n_predict" "input" "instructions" "hae" "kv_policy" "kv_budget" "tokens" "cache_prompt" "id_slot" '
                   '"logit_bias" "samplers" "n_probs" "timings_per_token" "return_tokens" data:image/png;base64, 1e308 -1 18446744073709551616 null true',
        "questions": '"question" "answer" "answers" "match" "anls" "contains" "wrong" "options" "facts" "turns" "task" "kind" "id" "images" '
                     '"imageId" "choices" "hint" "split" "mentions" PAR1 null -1',
        "picture": "IHDR IDAT IEND PLTE tRNS gAMA acTL fcTL fdAT eXIf iCCP RIFF WEBP VP8\\x20 VP8L VP8X ALPH ANIM ANMF EXIF GIF87a GIF89a "
                   "NETSCAPE2.0 BM JFIF \\xff\\xd8 \\xff\\xd9 \\xff\\xda \\xff\\xc0 \\xff\\xc2 \\xff\\xc4 \\xff\\xdb \\xff\\xdd \\xff\\xe1 \\xff\\xee Exif\\x00\\x00",
        "gguf": "GGUF general.architecture general.alignment llama. phi3. block_count context_length embedding_length attention.head_count "
                "tokenizer.ggml.tokens tokenizer.ggml.model split.count \\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff \\x00\\x00\\x00\\x80",
    }
    folder = HERE / "dictionaries"
    folder.mkdir(exist_ok=True)
    for target, text in words.items():
        lines = []
        for word in text.split():
            # Bytes by their number stay, all other backslashes and quotes are the word's own.
            if "\\x" not in word or target in ("grammar",):
                word = word.replace("\\", "\\\\")
            lines.append('"' + word.replace('"', '\\"') + '"')
        (folder / f"{target}.txt").write_text("\n".join(lines) + "\n")


pictures()
convert()
templates()
grammars()
questions()
requests()
dictionaries()
for target, n in [("controller", 6), ("policy", 6)]:
    for i in range(n):
        # Any bytes do: they are drawn from.
        seed(target, str(i), b"".join(zlib.crc32(bytes([i, j, len(target)])).to_bytes(4, "little") for j in range(100)))
