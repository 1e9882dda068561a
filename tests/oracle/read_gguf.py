"""Reads GGUFs by llama.cpp's package and compares: metadata and the table of tensors with what `hae inspect` shows, values
with those of the file of F32. Arguments: the program, and the folder with text-TYPE.gguf and mmproj-TYPE.gguf."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, dequantize

# Of a tensor's largest value, how far a value may be off: half of the last bit, or half a step of the coarsest block.
TOLERANCE = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-10, "Q4_0": 1 / 8, "Q4_K": 1 / 8, "Q5_K": 1 / 16, "Q6_K": 1 / 16}
NAMES = {"UINT8": "u8", "INT8": "i8", "UINT16": "u16", "INT16": "i16", "UINT32": "u32", "INT32": "i32", "FLOAT32": "f32",
         "BOOL": "bool", "STRING": "str", "UINT64": "u64", "INT64": "i64", "FLOAT64": "f64"}


def metadata(reader):
    """Each key with its type, its length and its first elements, without the three that are of the header."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        is_array = field.types[0] == GGUFValueType.ARRAY
        if is_array and not field.data:
            yield key, None, 0, []
            continue
        value = field.contents(slice(0, 32)) if is_array else field.contents()
        yield key, NAMES[field.types[-1].name], len(field.data) if is_array else None, value


def same(shown, own):
    if isinstance(own, float):
        return abs(shown - own) <= 1e-6 * abs(own)
    if isinstance(own, list):
        return len(shown) == len(own) and all(map(same, shown, own))
    return shown == own


def compare(program, path, exact):
    shown = json.loads(subprocess.run([program, "inspect", "--json", path], check=True, capture_output=True).stdout)
    reader = GGUFReader(path)
    wrong = []
    own = list(metadata(reader))
    if [key for key, *_ in own] != [entry["key"] for entry in shown["metadata"]]:
        wrong.append("other keys")
    for (key, kind, length, value), entry in zip(own, shown["metadata"]):
        if kind not in (None, entry["type"]) or length != entry.get("len") or not same(entry["value"], value):
            wrong.append(f"{key}: {entry} is {kind}[{length}] {value}")
    if [t.name for t in reader.tensors] != [t["name"] for t in shown["tensors"]]:
        wrong.append("other tensors")
    worst = 0.0
    for tensor, entry in zip(reader.tensors, shown["tensors"]):
        shape = [int(n) for n in tensor.shape]
        if tensor.tensor_type.name.lower() != entry["type"].lower() or shape != entry["shape"] or int(tensor.n_bytes) != entry["bytes"]:
            wrong.append(f"{tensor.name}: {entry} is {tensor.tensor_type.name} {shape} {tensor.n_bytes}")
        values = dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type)).ravel()
        # The file of F32 itself has nothing to be compared with.
        reference = exact.get(tensor.name, values)
        scale = float(np.abs(reference).max()) or 1.0
        off = float(np.abs(values - reference).max()) / scale
        worst = max(worst, off)
        if not off <= TOLERANCE[tensor.tensor_type.name]:
            wrong.append(f"{tensor.name}: values are off by {off} of the largest")
    print(f"| {Path(path).name} | {len(own)} | {len(reader.tensors)} | {worst:.1e} | {'; '.join(wrong[:3])} |")
    return not wrong


def main():
    program, folder = sys.argv[1], Path(sys.argv[2])
    print("| file | keys | tensors | values off by at most, of a tensor's largest | what is wrong |\n|---|---|---|---|---|")
    good = True
    for side in ("text", "mmproj"):
        first = GGUFReader(folder / f"{side}-f32.gguf")
        exact = {t.name: dequantize(t.data, GGMLQuantizationType(t.tensor_type)).ravel().copy() for t in first.tensors}
        for path in sorted(folder.glob(f"{side}-*.gguf")):
            good &= compare(program, path, exact)
    sys.exit(0 if good else 1)


main()
