// What the cache did, drawn: patches on pictures, cells over time, figures.

const SVG = "http://www.w3.org/2000/svg";

// By the numbers of `hae.seen.pictures[].states`.
const STATES = ["kept", "in the bin", "evicted", "looked up"];
// The order of the legend.
const SHOWN = [0, 3, 1, 2];

const one = (id) => document.getElementById(id);

// ---- words -----------------------------------------------------------------------------------------------

export function bytes(n) {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (n >= 1024 && unit + 1 < units.length) {
    n /= 1024;
    unit += 1;
  }
  return `${unit === 0 || n >= 100 ? Math.round(n) : n.toFixed(1)} ${units[unit]}`;
}

const number = (n) => n.toLocaleString("en");
const percent = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)} %` : "0 %");
const rate = (n) => `${n >= 100 ? Math.round(n) : n.toFixed(1)} tokens/s`;

// ---- patches ---------------------------------------------------------------------------------------------

// A patch, from (x, y), so wide and high. Each state has a shade and a shape of its own.
function paint(pen, state, x, y, w, h) {
  const fine = Math.min(w, h);
  if (state === 1) {
    pen.fillStyle = "rgba(230, 159, 0, 0.62)";
    pen.fillRect(x, y, w, h);
    if (fine >= 6) {
      pen.fillStyle = "rgba(60, 30, 0, 0.9)";
      const dot = Math.max(1.5, fine / 5);
      pen.fillRect(x + (w - dot) / 2, y + (h - dot) / 2, dot, dot);
    }
  }
  if (state === 2) {
    pen.fillStyle = "rgba(12, 16, 22, 0.84)";
    pen.fillRect(x, y, w, h);
    if (fine >= 6) {
      pen.strokeStyle = "rgba(255, 255, 255, 0.3)";
      pen.lineWidth = Math.max(1, fine / 16);
      pen.beginPath();
      pen.moveTo(x, y + h);
      pen.lineTo(x + w, y);
      pen.stroke();
    }
  }
  if (state === 3) {
    for (const [color, wide] of [["rgba(0, 0, 0, 0.75)", 0.2], ["#8fd6ff", 0.1]]) {
      const line = Math.max(wide > 0.15 ? 2 : 1, fine * wide);
      pen.strokeStyle = color;
      pen.lineWidth = line;
      pen.strokeRect(x + line / 2, y + line / 2, w - line, h - line);
    }
  }
}

// Thin lines between patches, so that those that were kept can be counted, too.
function grid(pen, cols, rows, w, h) {
  pen.strokeStyle = "rgba(128, 128, 128, 0.45)";
  pen.lineWidth = 1;
  pen.beginPath();
  for (let col = 1; col < cols; col += 1) {
    pen.moveTo(Math.round(col * w) + 0.5, 0);
    pen.lineTo(Math.round(col * w) + 0.5, rows * h);
  }
  for (let row = 1; row < rows; row += 1) {
    pen.moveTo(0, Math.round(row * h) + 0.5);
    pen.lineTo(cols * w, Math.round(row * h) + 0.5);
  }
  pen.stroke();
}

function draw(canvas, image, seen) {
  const { cols, rows, states, frame } = seen;
  // As fine as the screen is, and no patch narrower than a few pixels.
  const width = Math.max(Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)), cols * 4, 64);
  const size = width / cols;
  canvas.width = width;
  canvas.height = Math.round(size * rows);
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#e8ebee";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  if (frame && image.naturalWidth > 0) {
    const [x, y, w, h] = frame;
    pen.drawImage(image, x * canvas.width, y * canvas.height, w * canvas.width, h * canvas.height);
  }
  if (size >= 6) {
    grid(pen, cols, rows, size, size);
  }
  for (const [i, state] of states.entries()) {
    paint(pen, state, (i % cols) * size, Math.floor(i / cols) * size, size, size);
  }
}

function count(states) {
  const counts = [0, 0, 0, 0];
  for (const state of states) {
    counts[state] += 1;
  }
  return counts;
}

const inWords = (counts) => {
  const some = SHOWN.filter((state) => counts[state] > 0);
  return some.map((state) => `${counts[state]} ${STATES[state]}`).join(", ");
};

// One figure for each picture of the conversation. `images` are their elements in the chat, in order.
let figures = [];
let legend = null;

function figure(i) {
  const all = document.createElement("figure");
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  const caption = document.createElement("figcaption");
  all.append(canvas, caption);
  one("pictures").append(all);
  figures[i] = { canvas, caption, all, seen: null, image: null };
}

function makeLegend() {
  legend = [];
  for (const state of SHOWN) {
    const item = document.createElement("li");
    const swatch = document.createElement("canvas");
    swatch.width = swatch.height = 40;
    const pen = swatch.getContext("2d");
    // Bright and dark, as pictures are.
    const shade = pen.createLinearGradient(0, 0, 40, 40);
    shade.addColorStop(0, "#f5d8c8");
    shade.addColorStop(1, "#7f9f8f");
    pen.fillStyle = shade;
    pen.fillRect(0, 0, 40, 40);
    paint(pen, state, 0, 0, 40, 40);
    const n = document.createElement("b");
    item.append(swatch, STATES[state], n);
    one("legend").append(item);
    legend[state] = n;
  }
}

export function showPictures(seen, images) {
  if (!legend) {
    makeLegend();
  }
  const total = [0, 0, 0, 0];
  for (const picture of seen) {
    const i = picture.image;
    if (!images[i]) {
      continue;
    }
    if (!figures[i]) {
      figure(i);
    }
    const counts = count(picture.states);
    counts.forEach((n, state) => (total[state] += n));
    const { canvas, caption } = figures[i];
    Object.assign(figures[i], { seen: picture, image: images[i] });
    draw(canvas, images[i], picture);
    const words = inWords(counts);
    const where = picture.frame ? "" : " How they lie on the picture is not known.";
    caption.textContent = `Picture ${i + 1}: ${words} of ${picture.states.length} patches.${where}`;
    canvas.setAttribute("aria-label", caption.textContent);
    canvas.dataset.states = counts.join(" ");
  }
  one("no-pictures").hidden = figures.length > 0;
  one("legend").hidden = figures.length === 0;
  total.forEach((n, state) => (legend[state].textContent = number(n)));
}

// Another width or another density of the screen.
export function redraw() {
  for (const { canvas, image, seen } of figures.filter(Boolean)) {
    if (seen) {
      draw(canvas, image, seen);
    }
  }
}

// ---- cells over time -------------------------------------------------------------------------------------

// {x: tokens of all answers so far, text, vision, whole}
let samples = [];
// Where each answer began.
let turns = [];
let told = 0;

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  parent.append(made);
  return made;
}

// A round number at or above n.
function ceiling(n) {
  const power = 10 ** Math.floor(Math.log10(Math.max(n, 1)));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((top) => top >= n);
}

function chart() {
  const svg = one("chart");
  svg.replaceChildren();
  const last = samples.at(-1);
  if (!last) {
    svg.setAttribute("aria-label", "No answer yet");
    const nothing = element("text", { x: 180, y: 75, "text-anchor": "middle" }, svg);
    nothing.textContent = "No answer yet";
    return;
  }
  const [left, top, right, bottom] = [40, 8, 352, 128];
  const first = samples[0].x;
  const most = ceiling(Math.max(...samples.map((sample) => Math.max(sample.whole, sample.text + sample.vision))));
  const span = Math.max(last.x - first, 1);
  const x = (sample) => left + ((sample.x - first) / span) * (right - left);
  const y = (cells) => bottom - (cells / most) * (bottom - top);
  // A single sample is drawn as wide as the chart.
  const drawn = samples.length > 1 ? samples : [last, { ...last, x: last.x + 1 }];
  const line = (of, list = drawn) => list.map((sample) => `${x(sample).toFixed(1)},${y(of(sample)).toFixed(1)}`);
  const area = (low, high) => [...line(high), ...line(low, [...drawn].reverse())].join(" ");
  for (const part of [0, 0.5, 1]) {
    element("line", { x1: left, x2: right, y1: y(most * part), y2: y(most * part), class: "axis" }, svg);
    const label = element("text", { x: left - 5, y: y(most * part) + 4, "text-anchor": "end" }, svg);
    label.textContent = number(most * part);
  }
  const text = (sample) => sample.text;
  const both = (sample) => sample.text + sample.vision;
  element("polygon", { points: area(() => 0, text), class: "text" }, svg);
  element("polygon", { points: area(text, both), class: "vision" }, svg);
  element("polyline", { points: line((sample) => sample.whole).join(" "), class: "whole" }, svg);
  for (const turn of turns.filter((turn) => turn > first && turn < last.x)) {
    const at = x({ x: turn });
    element("line", { x1: at, x2: at, y1: top, y2: bottom, class: "turn" }, svg);
  }
  const begin = element("text", { x: left, y: 144 }, svg);
  begin.textContent = number(first);
  const end = element("text", { x: right, y: 144, "text-anchor": "end" }, svg);
  end.textContent = `${number(last.x)} tokens of answers`;
  svg.setAttribute(
    "aria-label",
    `Cells after ${last.x} tokens of answers: ${last.text} of text, ${last.vision} of pictures; a full cache would hold ${last.whole}`,
  );
}

// ---- figures ---------------------------------------------------------------------------------------------

let perCell = 0;

export function begin() {
  turns.push(told);
}

// `step`: tokens of this answer so far; `cells`: as in `hae.cells` of an answer.
export function showCells(step, cells) {
  const text = cells.live.text + cells.binned.text;
  const vision = cells.live.vision + cells.binned.vision;
  const whole = text + vision + cells.evicted.text + cells.evicted.vision;
  const x = (turns.at(-1) ?? 0) + step;
  told = Math.max(told, x);
  if (samples.at(-1)?.x === x) {
    samples.pop();
  }
  samples.push({ x, text, vision, whole });
  // A long conversation is drawn with every other sample.
  if (samples.length > 2000) {
    samples = samples.filter((_, i) => i % 2 === 0 || i + 1 === samples.length);
  }
  one("cells-text").textContent = number(text);
  one("cells-vision").textContent = number(vision);
  one("cells-whole").textContent = number(whole);
  const inUse = text + vision;
  one("in-use-cells").textContent = `${number(inUse)} cells`;
  one("saved-share").textContent = `${percent(whole - inUse, whole)} of a full cache`;
  // How large a cell is, the first answer says at its end.
  one("in-use").textContent = perCell > 0 ? bytes(inUse * perCell) : "…";
  one("saved").textContent = perCell > 0 ? bytes((whole - inUse) * perCell) : "…";
  chart();
}

// Behind an answer: its `usage`, `timings` and `hae`, each of which may be missing.
export function showAnswer(usage, timings, hae) {
  if (hae) {
    perCell = hae.bytes.per_cell;
    showCells(hae.tokens.generated, hae.cells);
    const host = hae.bytes.host > 0 ? `, and ${bytes(hae.bytes.host)} outside of it` : "";
    one("allocated").textContent = `${bytes(hae.bytes.allocated)}, ${number(hae.n_cells)} cells${host}`;
    const budget = hae.policy.params?.kv_budget;
    const most = budget?.share === undefined ? `${budget?.cells} cells` : percent(budget.share, 1);
    one("policy-used").textContent = budget ? `${hae.policy.name}, at most ${most}` : hae.policy.name;
  }
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    one("cached").textContent = `${number(cached)} of ${number(usage.prompt_tokens)} tokens`;
  }
  if (timings) {
    showTimings(timings);
  }
}

export function showTimings(timings) {
  if (timings.prompt_per_second > 0) {
    one("prompt-rate").textContent = rate(timings.prompt_per_second);
  }
  // The first token came with the prompt.
  if (timings.predicted_n > 1) {
    one("answer-rate").textContent = rate(timings.predicted_per_second);
  }
}

export function showSlots(slots) {
  const busy = slots.filter((slot) => slot.is_processing).length;
  one("slots").textContent = `${busy} of ${slots.length}`;
}

export function clear() {
  figures = [];
  samples = [];
  turns = [];
  told = 0;
  one("pictures").replaceChildren();
  one("no-pictures").hidden = false;
  one("legend").hidden = true;
  for (const id of ["cells-text", "cells-vision", "cells-whole", "saved", "in-use", "allocated", "cached"]) {
    one(id).textContent = "–";
  }
  for (const id of ["prompt-rate", "answer-rate", "policy-used"]) {
    one(id).textContent = "–";
  }
  one("saved-share").textContent = "of a full cache";
  one("in-use-cells").textContent = "no cells";
  chart();
}
