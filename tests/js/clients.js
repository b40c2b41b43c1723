// Vercel's `ai` package, with both of its providers that speak OpenAI's chat API, against the
// service at argv[2]. Prints one JSON object: what each provider made of each call.
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const compatible = createOpenAICompatible({
  name: "qwenvl",
  baseURL,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey: "none" });

const content = [
  { type: "image", image: readFileSync("demo/samples/red-circle.png") },
  { type: "text", text: "what is the red shape?" },
];
const messages = [{ role: "user", content }];
const schema = z.object({ shape: z.enum(["circle", "triangle"]), sides: z.literal([0, 3, 4]) });

async function attempt(call) {
  try {
    return await call();
  } catch (error) {
    return { error: error.name, status: error.statusCode, message: error.message };
  }
}

async function streamed(model) {
  const result = streamText({ model, messages, temperature: 0 });
  const pieces = [];
  for await (const piece of result.textStream) pieces.push(piece);
  return { text: pieces.join(""), usage: await result.usage, finish: await result.finishReason };
}

const count = {
  description: "Count shapes.",
  inputSchema: z.object({ shape: z.enum(["circle", "triangle"]), at: z.int() }),
};

function told(calls, finish) {
  return { calls: calls.map((call) => ({ name: call.toolName, input: call.input })), finish };
}

async function tools(model, name) {
  // Each provider's own word for it; the small model would call for ever.
  const few = { openai: { parallelToolCalls: false }, qwenvl: { parallel_tool_calls: false } };
  const asked = { model, temperature: 0, maxRetries: 0, providerOptions: { [name]: few[name] } };
  const one = { ...asked, messages, toolChoice: { type: "tool", toolName: "count" } };
  const result = streamText({ ...one, tools: { count } });
  let deltas = 0;
  for await (const part of result.fullStream) deltas += part.type === "tool-input-delta";
  // The package runs the tool, and its messages hold call and result.
  const whole = await generateText({ ...one, tools: { count: { ...count, execute: ({ at }) => at } } });
  const next = [...messages, ...whole.response.messages];
  const then = await generateText({ ...asked, messages: next, tools: { count }, maxOutputTokens: 4 });
  return {
    whole: told(whole.toolCalls, whole.finishReason),
    stream: { ...told(await result.toolCalls, await result.finishReason), deltas },
    results: whole.toolResults.map((each) => each.output),
    next: then.usage.outputTokens,
  };
}

async function aborted(model, endless) {
  const leaving = new AbortController();
  let ended = false;
  const { textStream } = streamText({
    model,
    prompt: "hello",
    abortSignal: leaving.signal,
    headers: { "X-Request-ID": endless.id },
    maxOutputTokens: 1000,
    providerOptions: endless.options,
    onAbort: () => {
      ended = true;
    },
  });
  for await (const _ of textStream) leaving.abort();
  return ended;
}

async function calls(model, name) {
  const asked = { model, messages, temperature: 0, maxRetries: 0 };
  const whole = await attempt(() => generateText(asked));
  return {
    whole: { text: whole.text, usage: whole.usage, finish: whole.finishReason },
    turns: await attempt(async () => {
      const next = [...messages, ...whole.response.messages, { role: "user", content: "sure?" }];
      return (await generateText({ ...asked, messages: next })).usage;
    }),
    stream: await attempt(() => streamed(model)),
    object: await attempt(async () => (await generateObject({ ...asked, schema })).object),
    options: await attempt(async () => {
      const options = { topP: 0.9, seed: -7, maxOutputTokens: 9999 };
      const penalties = { presencePenalty: 0, frequencyPenalty: 0, stopSequences: ["!"] };
      return (await generateText({ ...asked, ...options, ...penalties })).text;
    }),
    tools: await attempt(() => tools(model, name)),
    // `ignore_eos` is not OpenAI's: only the compatible provider sends what it does not know.
    aborted: await attempt(() =>
      aborted(model, { id: `js-${name}`, options: { qwenvl: { ignore_eos: true } } }),
    ),
    refused: await attempt(() =>
      generateText({ ...asked, providerOptions: { [name]: { reasoningEffort: "high" } } }),
    ),
  };
}

const answers = {
  qwenvl: await calls(compatible("demo"), "qwenvl"),
  openai: await calls(openai.chat("demo"), "openai"),
};
console.log(JSON.stringify(answers));
