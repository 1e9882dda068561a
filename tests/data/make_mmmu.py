"""The table that the reader of MMMU files is tested with: python make_mmmu.py (pyarrow, pillow)

Columns and types as in MMMU/MMMU's validation-00000-of-00001.parquet on the Hugging Face Hub; the
questions are ours.
"""
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(color):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": "x.png"}


def row(n, question, options, answer, kind, *images):
    return {"id": f"validation_Art_Theory_{n}", "question": question, "options": options, "explanation": "",
            **{f"image_{k}": images[k - 1] if k <= len(images) else None for k in range(1, 8)},
            "img_type": "['Paintings']", "answer": answer, "topic_difficulty": "Easy", "question_type": kind,
            "subfield": "Art Theory"}


rows = [
    row(1, "What color is <image 1>?", str(["red", "it's blue", 'the "other"']), "B", "multiple-choice", picture("blue")),
    row(2, "How many pictures?", "[]", "2", "open", picture("red"), picture("green")),
    row(3, "Is <image 2> like it?", "[]", "['no', 'not at all']", "open", picture("red"), picture("green")),
]
names = list(rows[0])
types = {name: IMAGE if name.startswith("image_") else pa.string() for name in names}
schema = pa.schema([(name, types[name]) for name in names])
pq.write_table(pa.Table.from_pylist(rows, schema=schema), Path(__file__).parent / "mmmu.parquet", compression="snappy")
