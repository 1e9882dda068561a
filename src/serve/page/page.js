// The chat. What a model says is untrusted: it is shown as text, and never read as HTML.

import * as cache from "./cache.js";

const one = (id) => document.getElementById(id);

// What the server said of itself, `/props`; null: it has not answered yet.
let props = null;
// {role, text, pictures: [data URLs]}
let messages = [];
// The elements of all pictures that were sent, in order.
let images = [];
// Pictures to send: {url, name}
let pending = [];
// Of the request under way.
let asking = null;

// ---- the server ------------------------------------------------------------------------------------------

const KEY = "hae-key";

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Why there is no answer, in words for people.
class Trouble extends Error {
  constructor(text, status) {
    super(text);
    this.status = status;
  }
}

const AWAY = "The server does not answer. Is hae serve still running?";

const tooLarge = () => {
  const most = props?.hae?.limits?.body;
  const bound = most ? ` of ${cache.bytes(most)}` : "";
  return `The conversation is over the server's limit${bound} a request. Send fewer or smaller pictures, or begin a new chat.`;
};

function words(status, error, retry) {
  const message = error?.message ?? "";
  if (error?.type === "exceed_context_size_error") {
    const sizes = error.n_prompt_tokens ? ` It needs ${error.n_prompt_tokens} cells, and there are ${error.n_ctx}.` : "";
    return `The conversation does not fit into the cache any more.${sizes} Begin a new chat, or send fewer pictures.`;
  }
  switch (status) {
    case 401:
      return "The server wants an API key.";
    case 403:
      return `The server does not let this page ask: ${message}`;
    case 413:
      return tooLarge();
    case 503: {
      const when = retry ? ` Try again in ${retry} seconds.` : " Try again later.";
      return `The server is busy: ${message || "no slot is free"}.${when}`;
    }
    default:
      return message ? `The server says: ${message}` : `The server answered with status ${status}.`;
  }
}

// A response that is one; else trouble. Who wants a key is asked for it, once: not where the page looks by itself.
async function ask(path, options = {}, byItself = false) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (e) {
    throw e.name === "AbortError" ? e : new Trouble(AWAY, 0);
  }
  if (response.ok) {
    return response;
  }
  const body = await response.json().catch(() => null);
  if (response.status === 401 && !byItself) {
    askForKey();
  }
  throw new Trouble(words(response.status, body?.error, response.headers.get("Retry-After")), response.status);
}

function showState(kind, text) {
  const state = one("state");
  // Said again only where it changed: it is read aloud.
  if (state.textContent !== text) {
    state.className = `state ${kind}`;
    state.textContent = text;
  }
}

async function load(byItself = false) {
  try {
    props = await (await ask("props", {}, byItself)).json();
  } catch (e) {
    showState("away", e.status === 401 ? "key wanted" : "not reached");
    return;
  }
  const name = props.model_alias ?? "";
  one("model").textContent = name;
  document.title = `${name} – hae`;
  const sees = props.modalities?.vision ?? false;
  one("add").disabled = !sees;
  one("add").title = sees ? "" : "This model sees no pictures";
  if (!sees) {
    one("welcome-pictures").textContent = "This model sees no pictures: it was loaded without a vision file.";
  }
  const policy = one("policy");
  const chosen = policy.value || stored().policy;
  const own = new Option(`the server's (${props.hae.policy})`, "");
  policy.replaceChildren(own, ...props.hae.policies.map((name) => new Option(name)));
  policy.value = props.hae.policies.includes(chosen) ? chosen : "";
  const defaults = props.default_generation_settings?.params ?? {};
  one("temperature").placeholder = defaults.temperature === undefined ? "" : String(Number(defaults.temperature.toFixed(3)));
  showState("ready", "ready");
}

// Looks after the server every few seconds, while somebody looks at the page.
async function watch() {
  if (document.hidden || one("key-dialog").open) {
    return;
  }
  if (!props) {
    return load(true);
  }
  try {
    if (props.endpoint_slots) {
      cache.showSlots(await (await ask("slots", {}, true)).json());
    } else {
      await ask("health", {}, true);
    }
    showState(asking ? "busy" : "ready", asking ? "answering" : "ready");
  } catch (e) {
    // It may come back with another model.
    if (!asking) {
      props = null;
      showState("away", e.status === 401 ? "key wanted" : "not reached");
    }
  }
}

function askForKey() {
  const dialog = one("key-dialog");
  if (!dialog.open) {
    const tried = sessionStorage.getItem(KEY) !== null;
    one("key-text").textContent = tried
      ? "The server does not know this key. Try another one."
      : "This server asks for a key. It is kept until this tab is closed.";
    dialog.showModal();
  }
}

// ---- settings --------------------------------------------------------------------------------------------

const SETTINGS = "hae-settings";
const KEPT = ["system", "temperature", "max-tokens", "policy", "budget"];

function stored() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

function keepSettings() {
  const values = KEPT.map((name) => [name, one(name).value]);
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(values)));
  } catch {
    // Some browsers keep nothing.
  }
}

function request() {
  const system = one("system").value.trim();
  const sent = messages.map(({ role, text, pictures }) => {
    if (pictures.length === 0) {
      return { role, content: text };
    }
    const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role, content: [...parts, { type: "text", text }] };
  });
  const body = {
    messages: system ? [{ role: "system", content: system }, ...sent] : sent,
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
    timings_per_token: true,
    hae: { watch: true },
  };
  const number = (id) => (one(id).value.trim() === "" ? undefined : Number(one(id).value));
  body.temperature = number("temperature");
  body.max_tokens = number("max-tokens");
  if (one("policy").value) {
    body.hae.kv_policy = one("policy").value;
  }
  // As text: the server tells 1.0 from 1, which numbers here do not.
  if (one("budget").value.trim()) {
    body.hae.kv_budget = one("budget").value.trim();
  }
  return body;
}

// ---- messages --------------------------------------------------------------------------------------------

function make(name, kind, text) {
  const made = document.createElement(name);
  made.className = kind;
  made.textContent = text;
  return made;
}

// `pictures`: data URLs. Gives the parts that change.
function show(role, text, pictures) {
  const all = make("article", `message ${role}`, "");
  const sent = make("div", "sent", "");
  const shown = pictures.map((url, i) => {
    const image = new Image();
    image.src = url;
    image.alt = `Picture ${images.length + i + 1}`;
    return image;
  });
  sent.append(...shown);
  const said = make("div", "said", text);
  const note = make("p", "note", "");
  all.append(make("div", "who", role === "user" ? "You" : "Model"));
  if (shown.length > 0) {
    all.append(sent);
  }
  all.append(said, note);
  one("welcome").hidden = true;
  one("log").append(all);
  return { all, said, note, shown };
}

// Follows the end of a message while it grows, unless somebody scrolled away from it.
function following(message) {
  const edge = () => one("composer").getBoundingClientRect().top - 12;
  const end = () => message.getBoundingClientRect().bottom;
  const near = end() < edge() + 80;
  return () => {
    const log = one("log");
    const box = getComputedStyle(log).overflowY === "visible" ? window : log;
    if (near && end() > edge()) {
      box.scrollBy(0, end() - edge());
    }
  };
}

function trouble(text) {
  one("trouble").textContent = text;
  one("trouble").hidden = !text;
}

function setAsking(controller) {
  asking = controller;
  one("stop").hidden = !controller;
  one("send").hidden = Boolean(controller);
  showState(controller ? "busy" : "ready", controller ? "answering" : "ready");
}

// ---- an answer -------------------------------------------------------------------------------------------

// The data of server-sent events, as they come.
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          yield line.slice(5).trim();
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const ENDS = { length: "Cut short: the limit of tokens or the end of the cache.", tool_calls: "It called a tool." };

// Reads one piece of the stream into the answer.
function take(piece, answer) {
  if (piece.error) {
    throw new Trouble(words(piece.error.code, piece.error, null), piece.error.code);
  }
  const choice = piece.choices?.[0];
  if (choice?.delta?.content) {
    const follow = following(answer.view.all);
    answer.text += choice.delta.content;
    // Plain text, whatever it looks like.
    answer.view.said.textContent = answer.text.trimStart();
    answer.view.note.textContent = "";
    follow();
  }
  if (choice?.finish_reason) {
    answer.end = choice.finish_reason;
  }
  const progress = piece.prompt_progress;
  if (progress && !answer.text) {
    answer.view.note.textContent = `Reading the prompt: ${progress.processed} of ${progress.total} tokens`;
  }
  const seen = piece.hae?.seen;
  if (seen) {
    cache.showPictures(seen.pictures, images);
    cache.showCells(seen.step, seen.cells);
  }
  if (piece.usage || piece.hae?.cells) {
    cache.showAnswer(piece.usage, piece.timings, piece.hae?.cells ? piece.hae : null);
  } else if (piece.timings) {
    cache.showTimings(piece.timings);
  }
}

async function send() {
  const text = one("question").value.trim();
  if (asking || (text === "" && pending.length === 0)) {
    return;
  }
  for (const id of ["temperature", "max-tokens", "budget"]) {
    if (!one(id).checkValidity()) {
      one("settings").open = true;
      one(id).reportValidity();
      return;
    }
  }
  trouble("");
  const question = { role: "user", text, pictures: pending.map((picture) => picture.url) };
  messages.push(question);
  const body = JSON.stringify(request());
  const most = props?.hae?.limits?.body;
  if (most && body.length > most) {
    messages.pop();
    trouble(tooLarge());
    return;
  }
  const asked = show("user", text, question.pictures);
  const before = images.length;
  images.push(...asked.shown);
  const taken = pending;
  one("question").value = "";
  pending = [];
  showThumbs();
  const answer = { text: "", end: null, view: show("assistant", "", []) };
  answer.view.all.setAttribute("aria-busy", "true");
  answer.view.all.scrollIntoView({ block: "center" });
  const controller = new AbortController();
  setAsking(controller);
  cache.begin();
  let why = "";
  try {
    await Promise.all(asked.shown.map((image) => image.decode().catch(() => {})));
    const response = await ask("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body,
      signal: controller.signal,
    });
    let whole = false;
    for await (const data of events(response)) {
      if (data === "[DONE]") {
        whole = true;
        break;
      }
      take(JSON.parse(data), answer);
    }
    if (!whole) {
      throw new Trouble("The answer broke off: the server has gone away.", 0);
    }
    answer.view.note.textContent = ENDS[answer.end] ?? "";
  } catch (e) {
    if (asking !== controller) {
      // A new chat was begun.
      return;
    }
    if (e.name === "AbortError") {
      answer.view.note.textContent = "Stopped.";
    } else {
      why = e instanceof Trouble ? e.message : "The answer broke off: the server has gone away.";
      answer.view.note.textContent = "Broken off.";
    }
    if (answer.text === "") {
      // Nothing came: the question goes back to where it was written.
      messages.pop();
      asked.all.remove();
      answer.view.all.remove();
      images.length = before;
      one("welcome").hidden = messages.length > 0;
      if (one("question").value === "" && pending.length === 0) {
        one("question").value = text;
        pending = taken;
        showThumbs();
      }
      answer.view = null;
    }
  }
  if (answer.view) {
    messages.push({ role: "assistant", text: answer.text, pictures: [] });
    answer.view.all.setAttribute("aria-busy", "false");
  }
  setAsking(null);
  trouble(why);
  watch();
}

function stop() {
  asking?.abort();
}

function newChat() {
  const old = asking;
  asking = null;
  old?.abort();
  setAsking(null);
  messages = [];
  images = [];
  pending = [];
  showThumbs();
  trouble("");
  for (const message of one("log").querySelectorAll(".message")) {
    message.remove();
  }
  one("welcome").hidden = false;
  cache.clear();
  one("question").focus();
}

// ---- pictures --------------------------------------------------------------------------------------------

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

const read = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

async function add(files) {
  trouble("");
  if (files.length > 0 && props && !props.modalities?.vision) {
    trouble("This model sees no pictures.");
    return;
  }
  const limits = props?.hae?.limits ?? {};
  for (const file of files) {
    const sent = images.length + pending.length;
    if (!KINDS.includes(file.type)) {
      trouble(`${file.name} is no picture of a kind that the server reads: PNG, JPEG, WebP, GIF or BMP.`);
    } else if (limits.picture_bytes && file.size > limits.picture_bytes) {
      trouble(`${file.name} is over the server's limit of ${cache.bytes(limits.picture_bytes)} a picture.`);
    } else if (limits.pictures && sent >= limits.pictures) {
      trouble(`A conversation holds at most ${limits.pictures} pictures here.`);
    } else {
      try {
        pending.push({ url: await read(file), name: file.name });
      } catch {
        trouble(`${file.name} could not be read.`);
      }
    }
  }
  showThumbs();
  one("question").focus();
}

function showThumbs() {
  const items = pending.map((picture, i) => {
    const item = document.createElement("li");
    const image = new Image();
    image.src = picture.url;
    image.alt = picture.name;
    const remove = make("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.addEventListener("click", () => {
      pending.splice(i, 1);
      showThumbs();
      one("question").focus();
    });
    item.append(image, remove);
    return item;
  });
  one("thumbs").replaceChildren(...items);
}

const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

// ---- what people do --------------------------------------------------------------------------------------

one("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
one("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && asking && !one("key-dialog").open) {
    stop();
    one("question").focus();
  }
});
one("stop").addEventListener("click", () => {
  stop();
  one("question").focus();
});
one("new-chat").addEventListener("click", newChat);
one("add").addEventListener("click", () => one("files").click());
one("files").addEventListener("change", async () => {
  const files = [...one("files").files];
  one("files").value = "";
  await add(files);
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length > 0) {
    event.preventDefault();
    add(files);
  }
});
document.addEventListener("dragover", (event) => {
  if (hasFiles(event)) {
    event.preventDefault();
    one("drop").hidden = false;
  }
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) {
    one("drop").hidden = true;
  }
});
document.addEventListener("drop", (event) => {
  one("drop").hidden = true;
  if (hasFiles(event)) {
    event.preventDefault();
    add([...event.dataTransfer.files]);
  }
});
one("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, one("key").value.trim());
  one("key").value = "";
  one("key-dialog").close();
  props = null;
  trouble("");
  load();
});
one("key-cancel").addEventListener("click", () => one("key-dialog").close());
let later = 0;
window.addEventListener("resize", () => {
  clearTimeout(later);
  later = setTimeout(cache.redraw, 100);
});

for (const [name, value] of Object.entries(stored())) {
  if (KEPT.includes(name) && name !== "policy") {
    one(name).value = value;
  }
}
for (const name of KEPT) {
  one(name).addEventListener("change", keepSettings);
}
cache.clear();
load();
setInterval(watch, 3000);
one("question").focus();
