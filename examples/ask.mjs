// node ask.mjs PICTURE QUESTION: the answer as it is written; Node 18 or later, no package.
import { readFile } from "node:fs/promises";

const [picture, question] = process.argv.slice(2);
const form = new FormData();
form.set("image", new Blob([await readFile(picture)], { type: "image/*" }), "picture");
form.set("prompt", question);
const response = await fetch(`${process.env.QWENVL_URL ?? "http://127.0.0.1:8000"}/v1/image/recognize`, {
  method: "POST",
  headers: {
    Accept: "text/event-stream",
    Authorization: `Bearer ${process.env.QWENVL_API_KEY ?? "none"}`,
  },
  body: form,
  signal: AbortSignal.timeout(150_000),
});
if (!response.ok) throw new Error(`${response.status}: ${await response.text()}`);
let rest = "";
for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
  const events = (rest + text).split("\n\n");
  rest = events.pop();
  for (const event of events) {
    if (event.startsWith("event: error")) throw new Error(event);
    process.stdout.write(JSON.parse(event.slice("data: ".length)).delta ?? "\n");
  }
}
