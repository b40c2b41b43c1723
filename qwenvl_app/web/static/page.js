// The page: pictures in, questions out, answers as they come.

import { answer, hasKey, model, phase, Refused, setKey } from "./api.js";
import { draw, marks } from "./boxes.js";
import { dataURL, shrunk } from "./pictures.js";
import { curl, python } from "./recipes.js";
import { toggle } from "./status.js";
import { explainer, hint, translate, word } from "./words.js";

const $ = (selector) => document.querySelector(selector);
const [log, question, problem] = [$("#log"), $("#question"), $("#problem")];

const attached = []; // files of the next question
const turns = []; // { role, text, files, urls }: what the model is told
let name = "";
let looks = 0; // at the name
let nextLook = null; // timer
let running = null; // AbortController of the answer that is coming

translate();
watch();
know();

// The model's name, which needs a key where keys are set.
async function know() {
  const look = ++looks;
  const { found = name, error } = await model().then(
    (found) => ({ found }),
    (error) => ({ error }),
  );
  if (look !== looks) return; // the latest decides: an earlier one may have had another key
  name = found;
  askForKey(error?.code === "unauthorized" ? error : null);
  $("#demo").hidden = name !== "demo";
}

// Shows the key's field, and beside it what was wrong with the key; hides both without an error.
function askForKey(error) {
  const wrong = error !== null && hasKey();
  $("#access").hidden = error === null;
  $("#key-problem").textContent = wrong ? explain(error) : "";
  $("#key").setAttribute("aria-invalid", String(wrong));
  if (wrong) $("#key").focus();
}

// The phase, in the header: every second until it is ready, then every ten.
async function watch() {
  clearTimeout(nextLook);
  let now = { phase: "away" };
  try {
    now = await phase();
  } catch {
    // away
  }
  const text = word(now.phase) + (now.phase === "loading" ? ` ${now.message} ${Math.round(now.phase_seconds)} s` : "");
  if ($("#phase").textContent !== text) $("#phase").textContent = text;
  $("#model").dataset.phase = now.phase;
  if (now.phase !== "away" && !name && $("#access").hidden) know();
  clearTimeout(nextLook); // of another look, meanwhile
  nextLook = setTimeout(watch, now.phase === "ready" ? 10_000 : 1000);
}

const isPicture = (file) => file.type.startsWith("image/") || /\.(hei[cf]|avif|tiff?)$/i.test(file.name);

function attach(files) {
  const other = [...files].find((file) => !isPicture(file));
  attached.push(...[...files].filter(isPicture));
  problem.textContent = other ? word("notPicture", { m: other.name }) : "";
  showAttached();
  write();
}

// To the next question; on a phone the keyboard would come up and hide the answer.
function write() {
  if (matchMedia("(hover: hover)").matches) question.focus();
}

function showAttached() {
  $("#attached").replaceChildren(...attached.map((file, index) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
    button.setAttribute("aria-label", `${word("remove")} ${file.name}`);
    button.onclick = () => {
      attached.splice(index, 1);
      showAttached();
    };
    item.append(picture(file), button);
    return item;
  }));
}

function picture(file) {
  const image = Object.assign(new Image(), { alt: file.name, src: URL.createObjectURL(file) });
  image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
  return image;
}

// A picture of the conversation. Its size is known when it is there: then the end is out of sight.
function shown(file) {
  const image = picture(file);
  image.addEventListener("load", () => log.lastElementChild?.scrollIntoView({ block: "end" }));
  return image;
}

function addTurn(role) {
  const article = $("#turn").content.cloneNode(true).firstElementChild;
  article.classList.add(role);
  article.querySelector("h3").textContent = word(role === "user" ? "you" : "model");
  log.append(article);
  $("#welcome").hidden = true;
  return article;
}

async function ask() {
  const text = question.value.trim();
  const files = [...attached];
  if (running) return;
  problem.textContent = "";
  if (!text || !(files.length || turns.length)) {
    problem.textContent = word(text ? "needPicture" : "need");
    return;
  }
  running = new AbortController();
  busy(true);
  let asked, answering, refused;
  try {
    const sent = $("#shrink").checked ? await Promise.all(files.map(shrunk)) : files;
    const turn = { role: "user", text, files: sent, urls: await Promise.all(sent.map(dataURL)) };
    asked = addTurn("user");
    asked.querySelector(".text").textContent = text;
    asked.querySelector(".pictures").append(...sent.map(shown));
    attached.length = 0;
    showAttached();
    question.value = "";
    answering = addTurn("assistant");
    await receive([...turns, turn], answering);
  } catch (error) {
    asked?.remove();
    answering?.remove();
    attached.splice(0, attached.length, ...files); // to be asked again
    showAttached();
    question.value = text;
    refused = error;
  } finally {
    running = null;
    busy(false);
  }
  write();
  if (refused) watch();
  if (refused?.code === "unauthorized") askForKey(refused);
  else if (refused) problem.textContent = explain(refused);
}

// Shows an answer while it comes, and keeps both turns once there is any of it.
async function receive(messages, article) {
  const began = performance.now();
  const text = article.querySelector(".text");
  let [first, usage, finish, timings, written] = [null, null, null, {}, ""];
  article.setAttribute("aria-busy", "true");
  article.scrollIntoView({ block: "end" });
  try {
    for await (const chunk of answer(name, messages.map(message), running.signal)) {
      ({ usage = usage, timings = timings } = chunk);
      const choice = chunk.choices[0];
      finish = choice?.finish_reason ?? finish;
      const piece = choice?.delta.content ?? "";
      if (!piece) continue;
      first ??= performance.now() - began;
      written += piece;
      text.textContent = written;
      article.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (!running.signal.aborted) throw error;
    if (!article.isConnected) return; // of a conversation that was left
    if (!written) throw new Refused("stopped");
    finish = "stopped";
  }
  article.removeAttribute("aria-busy");
  turns.push(messages.at(-1), { role: "assistant", text: written, files: [], urls: [] });
  mark(article, written);
  tell(article, messages, { whole: performance.now() - began, first, usage, finish, timings, written });
}

function message({ role, text, urls }) {
  return { role, content: [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }] };
}

// Draws the boxes of an answer over the last picture before it.
function mark(article, text) {
  const found = marks(text);
  const file = turns.findLast((turn) => turn.files.length)?.files.at(-1);
  if (!found.length || !file) return;
  const frame = document.createElement("figure");
  const image = shown(file);
  image.addEventListener("load", () => frame.append(draw(found, image.naturalWidth, image.naturalHeight)));
  frame.append(image);
  article.querySelector(".pictures").append(frame);
}

const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

// How long each stage took, and the buttons that copy.
function tell(article, messages, { whole, first, usage, finish, timings, written }) {
  const facts = [];
  const add = (name, value = "") => {
    const fact = Object.assign(document.createElement("li"), { textContent: `${word(name)} ${value}` });
    fact.append(Object.assign(document.createElement("span"), { className: "hint", textContent: hint(name) }));
    facts.push(fact);
  };
  if (finish === "stopped" || finish === "length") add(finish === "stopped" ? "stopped" : "cut");
  if (first !== null) add("first", time(first));
  add("whole", time(whole));
  for (const stage of ["queue", "image", "preprocess", "prefill"]) {
    if (timings[`${stage}_ms`] >= 0.5) add(stage, time(timings[`${stage}_ms`]));
  }
  if (usage) {
    const known = usage.prompt_tokens_details.cached_tokens;
    add("read", `${usage.prompt_tokens}${known ? ` (${word("known")} ${known})` : ""}`);
    add("written", usage.completion_tokens);
  }
  article.querySelector(".times").append(...facts);
  const copies = { [word("copy")]: written };
  const asked = messages.at(-1);
  if (messages.length === 1 && asked.files.length === 1) copies.curl = curl(asked);
  copies.Python = python(name, messages);
  const footer = article.querySelector("footer");
  footer.querySelector(".copies").append(
    ...Object.entries(copies).map(([label, text]) => copyButton(label, text)),
    explainer(footer),
  );
  footer.hidden = false;
  article.scrollIntoView({ block: "end" });
}

function copyButton(label, text) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: label });
  button.onclick = async () => {
    await copy(text);
    button.textContent = word("copied");
    setTimeout(() => (button.textContent = label), 1500);
  };
  return button;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // A page that came without TLS has no clipboard but this one.
  const area = Object.assign(document.createElement("textarea"), { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function explain(error) {
  const code = error instanceof Refused ? error.code : "broken";
  return word(code, { s: error.seconds ?? 5, m: error.message });
}

function busy(yes) {
  $("#stop").hidden = !yes;
  $("#send").hidden = yes;
}

$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // Enter also ends a Chinese word
  event.preventDefault();
  ask();
});
$("#stop").onclick = () => running?.abort();
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("#fresh").onclick = () => {
  running?.abort();
  turns.length = attached.length = 0;
  log.replaceChildren();
  showAttached();
  problem.textContent = "";
  $("#welcome").hidden = false;
  write();
};
$("#status-title").after(explainer($("#status")));
$("#show-status").onclick = () => toggle($("#show-status"), $("#status"));
$("#access").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("#key").value);
  problem.textContent = "";
  know().then(() => $("#access").hidden && write());
});
for (const id of ["#choose", "#photo"]) {
  $(id).addEventListener("change", (event) => {
    attach(event.target.files);
    event.target.value = "";
  });
}
for (const button of document.querySelectorAll("#samples button")) {
  button.onclick = async () => {
    const image = button.querySelector("img");
    const blob = await (await fetch(image.src)).blob();
    attach([new File([blob], image.alt, { type: blob.type })]);
    if (!question.value) question.value = word("sure");
  };
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) attach(event.clipboardData.files);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("drop");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("drop"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("drop");
  attach(event.dataTransfer.files);
});
