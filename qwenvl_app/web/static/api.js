// The service's routes, as the page uses them.

const root = new URL(document.body.dataset.root, location.href);
let key = sessionStorage.getItem("key") ?? "";

export const address = (path) => new URL(path, root).href;
export const hasKey = () => key !== "";
export function setKey(text) {
  key = text.trim();
  sessionStorage.setItem("key", key);
}

// An answer that is no answer: a code of the service's, its text, and when to try again.
export class Refused extends Error {
  constructor(code, message = "", seconds = null) {
    super(message);
    this.code = code;
    this.seconds = seconds;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("away");
  }
  return response;
}

// The server refuses some requests by their head, before a route can shape the answer.
const BY_CODE = { loading: "notReady" };
const BY_STATUS = { 401: "unauthorized", 413: "too_large", 429: "busy", 503: "busy", 504: "deadline" };

async function refusal(response) {
  const { message = response.statusText, param, code: reason } = (await response.json().catch(() => ({}))).error ?? {};
  const code = param?.endsWith(".image_url") ? "bad_image" : BY_CODE[reason] ?? BY_STATUS[response.status] ?? "other";
  return new Refused(code, message, response.headers.get("Retry-After"));
}

// The model's name. Throws Refused.
export async function model() {
  const response = await ask("v1/models");
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data[0].id;
}

// The phase of the service.
export async function phase() {
  return (await ask("readyz")).json();
}

// Prometheus' text as a map from a series, labels included, to its value.
export async function metrics() {
  const text = await (await ask("metrics")).text();
  const lines = text.split("\n").filter((line) => line.startsWith("qwenvl_"));
  return new Map(lines.map((line) => {
    const end = line.lastIndexOf(" ");
    return [line.slice(7, end), Number(line.slice(end + 1))];
  }));
}

// Chunks of an answer as they arrive (WHATWG HTML, server-sent events). Throws Refused.
export async function* answer(name, messages, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model: name, messages, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let [rest, ended] = ["", false]; ;) {
    const { value, done } = await reader.read();
    if (done && !ended) throw new Refused("broken");
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      ended = data === "[DONE]";
      if (ended) break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.code === "deadline" ? "deadline" : "broken");
      yield chunk;
    }
  }
}
