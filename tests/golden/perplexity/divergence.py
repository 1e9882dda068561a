"""Writes divergence.json: what llama-perplexity --kl-divergence states of twelve rows of logits beside twelve others.

    python divergence.py

By the formulas of llama.cpp's tools/perplexity/perplexity.cpp, in float64 but for what the file of predictions rounds.
The rows are made up; src/eval/divergence/tests.rs makes the same.
"""

import json
import math
import struct
from pathlib import Path

ROWS, VOCAB, WINDOW = 12, 5, 4
T = 4.302652729911275  # scipy.stats.t.ppf(0.975, 2): three windows


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def log_softmax(row):
    total = sum(math.exp(x) for x in row)
    return [x - math.log(total) for x in row]


def kept(row):
    """A row of log probabilities as the file has it: 16 bits each above the least."""
    most = max(row)
    least = max(min(row), most - 16)
    scale = f32((most - least) / 65535)
    lowest = f32(least - most - math.log(sum(math.exp(x - most) for x in row)))
    bits = [round(f32(f32(x - least) * f32(1 / scale))) if x > least else 0 for x in row]
    return [lowest + scale * b for b in bits]


def mean(values):
    return sum(values) / len(values)


def covariance(a, b):
    """Of two means."""
    return (mean([x * y for x, y in zip(a, b)]) - mean(a) * mean(b)) / (len(a) - 1)


def error(values):
    return math.sqrt(covariance(values, values))


def quantile(values, share):
    at = share * (len(values) - 1)
    i = int(at)
    values = sorted(values)
    return values[i] * (1 - at + i) + values[min(i + 1, len(values) - 1)] * (at - i)


def interval(values):
    """Student's t of the windows' means, which are equally long."""
    means = [mean(values[i : i + WINDOW]) for i in range(0, len(values), WINDOW)]
    middle, n = mean(means), len(means)
    half = T * math.sqrt(sum((x - middle) ** 2 for x in means) / (n - 1) / n)
    return [middle - half, middle + half]


own = [[(i * 37 + j * 11) % 29 / 4 - 3.5 for j in range(VOCAB)] for i in range(ROWS)]
base = [[x + ((i * 7 + j * 13) % 9 - 4) / 4 for j, x in enumerate(row)] for i, row in enumerate(own)]
base[5][2] = -30.0
tokens = [(3 * i + 1) % VOCAB for i in range(ROWS)]

nll, nll_base, kl, dp, same = [], [], [], [], []
for logits, other, token in zip(own, base, tokens):
    q, p = log_softmax(logits), kept(other)
    nll.append(-q[token])
    nll_base.append(-p[token])
    kl.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q) if a > -16))
    dp.append(math.exp(q[token]) - math.exp(p[token]))
    same.append(float(q.index(max(q)) == p.index(max(p))))

together = covariance(nll, nll_base)
ratio = [a - b for a, b in zip(nll, nll_base)]
ppl, ppl_base = math.exp(mean(nll)), math.exp(mean(nll_base))
ppl_error, base_error = ppl * error(nll), ppl_base * error(nll_base)
ln_ratio = [mean(ratio), math.sqrt(error(nll) ** 2 + error(nll_base) ** 2 - 2 * together)]
square = [x * x for x in dp]
rms = math.sqrt(mean(square))
shares = {"max": 1, "p99_9": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "p75": 0.75, "median": 0.5}
shares |= {"p25": 0.25, "p10": 0.1, "p5": 0.05, "p1": 0.01, "p0_1": 0.001, "min": 0}
found = {
    "ppl": [ppl, ppl_error],
    "ppl_base": [ppl_base, base_error],
    "correlation": together / error(nll) / error(nll_base),
    "ln_ratio": ln_ratio,
    "ppl_ratio": [math.exp(ln_ratio[0]), math.exp(ln_ratio[0]) * ln_ratio[1]],
    "ppl_ratio_interval": [math.exp(x) for x in interval(ratio)],
    "ppl_difference": [
        ppl - ppl_base,
        math.sqrt(ppl_error**2 + base_error**2 - 2 * ppl * ppl_base * together),
    ],
    "kl": [mean(kl), error(kl)],
    "kl_interval": [max(0.0, x) for x in interval(kl)],
    "kl_quantiles": {name: quantile(kl, share) for name, share in shares.items()},
    "dp": [mean(dp), error(dp)],
    "dp_quantiles": {name: quantile(dp, share) for name, share in shares.items()},
    "dp_rms": [rms, 0.5 / rms * error(square)],
    "top1": [mean(same), math.sqrt(mean(same) * (1 - mean(same)) / (ROWS - 1))],
    "top1_interval": [min(1.0, max(0.0, x)) for x in interval(same)],
}
(Path(__file__).parent / "divergence.json").write_text(json.dumps(found, indent=1) + "\n")
