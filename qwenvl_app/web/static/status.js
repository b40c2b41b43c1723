// What the service is doing, from /metrics, for who has no Grafana.

import { metrics } from "./api.js";
import { hint, word } from "./words.js";

const EVERY_MS = 2000;
const KEPT = 60; // two minutes
const rates = [];
let before = null;
let timer = null;

const sum = (now, name) =>
  [...now].filter(([series]) => series === name || series.startsWith(`${name}{`)).reduce((all, [, value]) => all + value, 0);

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

function refusals(now) {
  const all = [...now]
    .filter(([series, count]) => /^request_(rejected|failed|cancelled)_total\{/.test(series) && count > 0)
    .map(([series, count]) => `${series.match(/reason="(\w+)"/)[1]} ${count}`);
  return all.join(", ") || word("none");
}

function show(now, rate) {
  const answers = now.get("time_to_first_token_seconds_count");
  const budget = now.get("kv_cache_budget_tokens");
  const rows = {
    running: `${now.get("num_requests_running")} / ${now.get("batch_slots")}`,
    waiting: now.get("num_requests_waiting"),
    tokens: rate.toFixed(0),
    // A gateway has no cache of its own.
    ...(budget && { kv: `${now.get("kv_cache_tokens").toLocaleString()} / ${budget.toLocaleString()}` }),
    ttft: answers ? seconds(now.get("time_to_first_token_seconds_sum") / answers) : "–",
    refused: refusals(now),
  };
  document.querySelector("#figures").replaceChildren(...Object.entries(rows).map(([name, value]) => {
    const row = document.createElement("div");
    row.append(
      Object.assign(document.createElement("dt"), { textContent: word(name) }),
      Object.assign(document.createElement("dd"), { textContent: value }),
      Object.assign(document.createElement("dd"), { className: "hint", textContent: hint(name) }),
    );
    return row;
  }));
  const most = Math.max(1, ...rates);
  const points = rates.map((one, index) => `${(index * 120) / (KEPT - 1)},${31 - (one / most) * 30}`);
  document.querySelector("#rate polyline").setAttribute("points", points.join(" "));
}

async function look() {
  try {
    const now = { at: performance.now(), series: await metrics() };
    const tokens = (one) => sum(one.series, "generation_tokens_total");
    const rate = before ? ((tokens(now) - tokens(before)) / (now.at - before.at)) * 1000 : 0;
    before = now;
    rates.push(rate);
    rates.splice(0, rates.length - KEPT);
    show(now.series, rate);
  } catch {
    // The next look tells; the phase says meanwhile that the service is away.
  }
}

// Shows or hides the view; hidden, it asks nothing.
export function toggle(button, view) {
  view.hidden = !view.hidden;
  button.setAttribute("aria-expanded", String(!view.hidden));
  clearInterval(timer);
  if (view.hidden) return;
  look();
  timer = setInterval(look, EVERY_MS);
}
