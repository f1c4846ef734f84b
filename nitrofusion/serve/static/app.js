// The page: controls in, pictures out. Everything that is typed goes out at once; the server draws the newest.

import { History } from "./history.js";
import { Live } from "./live.js";
import { Meter } from "./meter.js";
import { readSettings, understood } from "./png.js";
import { Source } from "./source.js";
import { Stage } from "./stage.js";

const $ = (id) => document.getElementById(id);
const SETTLED = 700;  // ms without input until a picture enters the history
const SLOW = 250;     // ms until the bar of waiting appears
const FIRST = ["prompt", "negative_prompt", "seed", "num_inference_steps", "strength", "model"];  // of a PNG's settings
const live = new Live(), meter = new Meter(), stage = new Stage(), source = new Source(), past = new History();
const asked = new Map();  // seq -> {time, settings}
const saving = new Map();  // seq -> the prompt it was of
const AWAY = {  // why there is no connection: in brief, in words
  "": ["reconnecting", "The server is away, reconnecting"],
  token: ["token needed", "This server asks for its token: open the address that it printed, with #token= at its end"],
  full: ["server full", "The server has no place for another live user, trying again"],
};
let info = null, seq = 0, shown = 0, uploaded = null, newest = null, timers = {};

// Settings as the controls have them.
function settings() {
  return {
    prompt: $("prompt").value.trim().toWellFormed(),
    negative_prompt: $("negative").value.trim().toWellFormed(),
    steps: Number(document.querySelector("#steps input:checked")?.value ?? info.default_steps),
    seed: seedOf($("seed").value),
    strength: Number($("strength").value),
    refine: $("refine").checked,
    image: source.bytes,
  };
}

const seedOf = (text) => Math.min(Math.max(Math.trunc(Number(text)) || 0, 0), Number.MAX_SAFE_INTEGER);

function apply(wanted) {
  if ("prompt" in wanted) $("prompt").value = wanted.prompt;
  $("negative").value = wanted.negative_prompt ?? "";
  const radio = document.querySelector(`#steps input[value="${wanted.steps}"]`);  // none of another model's steps
  if (radio) radio.checked = true;
  if ("seed" in wanted) $("seed").value = wanted.seed;
  if (wanted.strength) $("strength").value = wanted.strength;
  if ("refine" in wanted) $("refine").checked = wanted.refine;
  $("strength-value").textContent = Number($("strength").value).toFixed(2);
  examples();
}

function message(now, extra = {}) {
  return {
    type: "draw", seq: ++seq, prompt: now.prompt, negative_prompt: now.negative_prompt || null,
    num_inference_steps: now.steps, seed: now.seed, image: now.image !== null,
    ...(now.image !== null && { strength: now.strength }), ...extra,
  };
}

// Asks for the picture of the present settings. `time` is when the input happened.
function draw(time = performance.now()) {
  if (!info || !live.open) return;
  const now = settings();
  if (!now.prompt) return;
  const steps = stage.comparing ? info.steps[0] : now.steps;
  const refine = stage.comparing || (now.refine && !source.streaming) ? info.steps.at(-1) : 0;
  const out = message({ ...now, steps }, { refine });
  live.send(out, now.image !== uploaded ? now.image : null);
  uploaded = now.image ?? uploaded;
  asked.set(out.seq, { time, settings: now, key: keyOf(now, Math.max(steps, refine)) });
  clearTimeout(timers.slow);
  timers.slow = setTimeout(() => ($("wait").hidden = shown >= seq), SLOW);
  clearTimeout(timers.settled);
}

// What the finished picture is a function of.
const keyOf = (now, steps) => JSON.stringify([
  info.model, now.prompt, now.negative_prompt, now.seed, steps, now.image && [now.strength, now.image.length, ...now.image.slice(-64)],
]);

async function picture({ detail: got }) {
  const bitmap = await createImageBitmap(got.blob);
  const input = asked.get(got.seq);
  if (!input || got.seq < shown) return bitmap.close();
  stage.show(got.seq, got.steps, bitmap, input.settings.prompt);
  if (got.seq > shown) {
    meter.add(performance.now() - input.time);
    shown = got.seq;
    for (const old of asked.keys()) if (old < shown) asked.delete(old);
  }
  meter.server(got.queue, got.dropped);
  if (shown >= seq) idle();
  if (got.steps < stage.shownSteps) return;  // decoded later than its own refinement
  const words = `${got.steps} ${got.steps === 1 ? "step" : "steps"}`;
  $("caption").textContent = `${words} · ${(got.seconds * 1000).toFixed(1)} ms`;
  $("caption").title = "Time in the model";
  document.body.dataset.seq = got.seq;
  document.body.dataset.steps = got.steps;
  if (got.seq === seq) settle(input, got.steps, words);
  if (source.streaming) source.next();
}

// A picture that stays a moment enters the history; its later stages replace it there.
function settle(input, steps, words) {
  clearTimeout(timers.settled);
  timers.settled = setTimeout(() => {
    if (source.streaming) return;
    past.put(input.key, { ...input.settings, shown: steps }, stage.thumbnail(256));
    $("status").textContent = `Picture of ${input.settings.prompt}, ${words}`;
  }, SETTLED);
}

// Nothing is waited for any more.
function idle() {
  clearTimeout(timers.slow);
  $("wait").hidden = true;
}

function say(text) {
  $("alert").textContent = text;
  clearTimeout(timers.say);
  timers.say = setTimeout(() => ($("alert").textContent = ""), 6000);
}

// No picture comes. That does not end the webcam's.
function failed(text, of = null) {
  say(text);
  if (of === null || of === seq) idle();
  clearTimeout(timers.again);
  timers.again = setTimeout(() => source.next(), 1000);
}

// Connection.

live.addEventListener("hello", ({ detail }) => {
  const other = info && info.model !== detail.model, back = $("model").classList.contains("off");
  info = detail;
  uploaded = null;
  $("model").hidden = false;
  $("model").className = "chip";
  $("model").textContent = `${info.model} · ${info.width} px · ${info.device}`;
  $("notice").textContent = `${info.notice}; version ${info.version}`;
  const chosen = document.querySelector("#steps input:checked")?.value;
  if (!chosen || other) stepButtons();
  if (other) $("examples").replaceChildren();
  if (back) $("status").textContent = "Connected";
  source.setup(info);
  stage.setup(info);
  examples();
  draw();
});

live.addEventListener("close", ({ detail }) => {
  const [chip, words] = AWAY[detail];
  $("model").hidden = false;
  $("model").className = "chip off";
  $("model").textContent = chip;
  if (detail) $("notice").textContent = words;
  if ($("status").textContent !== words) $("status").textContent = words;  // told once, not with every attempt
  idle();
});

live.addEventListener("picture", (event) => picture(event).catch((error) => failed(`This picture cannot be shown: ${error.message}`)));
live.addEventListener("error", ({ detail }) => failed(detail.message, detail.seq));
live.addEventListener("saved", ({ detail }) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(detail.blob);
  const name = (saving.get(detail.seq) ?? settings().prompt).replace(/[^\p{L}\p{M}\p{N}]+/gu, "-");
  link.download = `${[...name].slice(0, 60).join("").replace(/^-|-$/g, "") || "nitrofusion"}.png`;
  link.click();
  saving.delete(detail.seq);
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  $("status").textContent = `Downloaded ${link.download}`;
});

function stepButtons() {
  const nearest = info.steps.includes(info.default_steps) ? info.default_steps : info.steps[0];
  $("steps").replaceChildren(...info.steps.map((n) => {
    const label = document.createElement("label"), radio = document.createElement("input"), span = document.createElement("span");
    Object.assign(radio, { type: "radio", name: "steps", value: n, checked: n === nearest });
    span.textContent = n;
    label.append(radio, span);
    return label;
  }));
  const one = info.steps.length < 2;
  if (one) stage.compare(false);
  $("compare").hidden = one;
  $("refine").closest("label").hidden = one;
}

function examples() {
  const empty = !$("prompt").value.trim();
  $("examples").hidden = !empty;
  if (!empty || !info || $("examples").children.length) return;
  $("examples").replaceChildren(...info.examples.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", (event) => {
      $("prompt").value = text;
      $("prompt").focus();
      changed(event);
    });
    return button;
  }));
}

// Controls. An event's time is when the user acted, not when the page got to it.

function changed(event) {
  if ($("lock").ariaPressed === "false" && [$("prompt"), $("negative")].includes(event.target)) $("seed").value = randomSeed();
  $("strength-value").textContent = Number($("strength").value).toFixed(2);
  examples();
  draw(event.timeStamp);
}

const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function shuffle(event) {
  $("seed").value = randomSeed();
  draw(event.timeStamp);
}

function lock() {
  const on = $("lock").ariaPressed !== "true";
  $("lock").ariaPressed = String(on);
  $("lock").title = on ? "Locked: the same seed for every picture" : "Open: another seed with every input";
  $("status").textContent = on ? "Seed locked" : "Another seed with every input";
}

function compare(event) {
  if ($("compare").hidden || $("compare").disabled) return;
  stage.compare(!stage.comparing);
  draw(event.timeStamp);
  if (stage.comparing) $("slider").focus();
}

function save() {
  if (!info || !live.open) return say("The server is away");
  const now = settings();
  if (!now.prompt) return say("There is no picture yet: type a prompt");
  now.steps = stage.shownSteps ?? now.steps;
  const out = message(now, { save: true });
  saving.set(out.seq, now.prompt);
  live.send(out, now.image !== uploaded ? now.image : null);
  uploaded = now.image ?? uploaded;
  seq -= 1;  // the next picture's
}

$("panel").addEventListener("input", (event) => event.target.id === "file" || changed(event));
$("panel").addEventListener("submit", (event) => event.preventDefault());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) event.preventDefault();
  if (event.key === "Escape") $("prompt").blur();
});
$("seed").addEventListener("change", () => ($("seed").value = seedOf($("seed").value)));  // as it was drawn with
$("shuffle").addEventListener("click", shuffle);
$("lock").addEventListener("click", lock);
$("compare").addEventListener("click", compare);
$("save").addEventListener("click", save);
past.addEventListener("choose", async ({ detail }) => {
  apply(detail);
  if (await source.restore(detail.image)) draw();
});

// Images: files, the clipboard, the webcam.

source.addEventListener("change", () => draw());
source.addEventListener("lost", () => {
  say("Webcam: it was switched off or unplugged");
  draw();
});
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => $("file").files[0] && offered($("file").files[0]).then(() => ($("file").value = "")));
$("remove").addEventListener("click", () => {
  source.clear();
  $("choose").focus();
  draw();
});
$("camera").addEventListener("click", async () => {
  try {
    if (source.streaming) source.stop();
    else await source.start();
  } catch (error) {
    say(`Webcam: ${error.message}`);
  }
  draw();
});

// A file from outside. Settings in it are shown first; nothing is drawn before the user says so.
async function offered(file) {
  if (!info) return;
  const mine = (newest = file);
  let found = null;
  try {
    found = await readSettings(file);
  } catch (error) {
    say(`${file.name}: ${error.message}`);
  }
  if (mine !== newest) return;
  if (found) return ask(file, found);
  try {
    await source.take(file);
  } catch (error) {
    say(error.message);
  }
}

function ask(file, found) {
  const { settings: wanted, notes } = understood(found, info);
  const rank = ([name]) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  const entries = Object.entries(found).sort((a, b) => rank(a) - rank(b)), rows = entries.slice(0, 40);
  if (entries.length > rows.length) notes.push(`${entries.length - rows.length} more entries are not shown`);
  $("loaded-rows").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td");
    head.textContent = name.slice(0, 60);
    cell.dir = "auto";
    cell.textContent = (typeof value === "string" ? value : JSON.stringify(value)).slice(0, 5000);
    row.append(head, cell);
    return row;
  }));
  $("loaded-note").textContent = notes.length ? `Note: ${notes.join("; ")}.` : "";
  $("loaded-apply").onclick = () => {
    $("loaded").close();
    apply(wanted);
    if (found.image === undefined) source.clear();
    draw();
  };
  $("loaded-image").onclick = () => {
    $("loaded").close();
    source.take(file).catch((error) => say(error.message));
  };
  $("loaded").showModal();
}

$("loaded-cancel").addEventListener("click", () => $("loaded").close());
const brings = (event) => event.dataTransfer.types.includes("Files");  // text goes where it is dropped
document.addEventListener("dragover", (event) => {
  if (!brings(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => (event.relatedTarget ? null : ($("drop").hidden = true)));
document.addEventListener("drop", (event) => {
  if (!brings(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  if (event.dataTransfer.files[0]) offered(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const text = event.target.closest("textarea, input") && event.clipboardData.types.includes("text/plain");
  if (event.clipboardData.files[0] && !text) offered(event.clipboardData.files[0]);
});

// Keys.

const KEYS = {
  "/": () => $("prompt").focus(), s: shuffle, l: lock, c: compare, d: save, "?": () => $("help").showModal(),
  "[": () => past.step(1), "]": () => past.step(-1),
};
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("textarea, input:not([type=radio], [type=checkbox], [type=range]), dialog");
  if (typing || !$("keys").checked || event.ctrlKey || event.metaKey || event.altKey) return;
  const radio = document.querySelector(`#steps input[value="${CSS.escape(event.key)}"]`);
  if (!KEYS[event.key] && !radio) return;
  event.preventDefault();
  if (KEYS[event.key]) return KEYS[event.key](event);
  radio.checked = true;
  draw(event.timeStamp);
});
$("help-open").addEventListener("click", () => $("help").showModal());
$("help-close").addEventListener("click", () => $("help").close());

live.connect();
