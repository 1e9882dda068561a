// Vercel's AI SDK against `hae serve` with the built-in model: what web applications do. `cargo xtask serve
// clients` starts the server and runs this; HAE_URL says where it is, HAE_ROOT where this repository lies.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const url = process.env.HAE_URL;
const picture = readFileSync(join(process.env.HAE_ROOT, "models/demo.png"));
const provider = createOpenAICompatible({
  name: "hae",
  baseURL: `${url}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("any");

const shown = [
  {
    role: "user",
    content: [
      { type: "image", image: picture, mediaType: "image/png" },
      { type: "text", text: "Where is the red triangle?" },
    ],
  },
];
const asked = (more) => ({ model, messages: shown, maxOutputTokens: 24, temperature: 0, maxRetries: 0, ...more });

test("a chat about a picture", async () => {
  const { text, finishReason, usage } = await generateText(asked());
  assert.ok(text.trim());
  assert.ok(["stop", "length"].includes(finishReason), finishReason);
  assert.ok(usage.inputTokens > 100, "a picture is some hundreds of tokens");
  assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
});

test("a stream says the same", async () => {
  const whole = await generateText(asked());
  const stream = streamText(asked());
  let text = "";
  let pieces = 0;
  for await (const piece of stream.textStream) {
    text += piece;
    pieces += 1;
  }
  assert.equal(text, whole.text);
  assert.ok(pieces > 1, "it comes in one piece");
  assert.equal(await stream.finishReason, whole.finishReason);
  const usage = await stream.usage;
  assert.equal(usage.outputTokens, whole.usage.outputTokens);
  assert.ok(usage.inputTokenDetails.cacheReadTokens > 0, "the slot holds the prompt");
});

test("a second question goes on from the first", async () => {
  const first = await generateText(asked());
  const messages = [
    ...shown,
    { role: "assistant", content: first.text },
    { role: "user", content: "And where is the circle?" },
  ];
  const { text, usage } = await generateText(asked({ messages }));
  assert.ok(text.trim());
  assert.ok(usage.inputTokenDetails.cacheReadTokens > 100);
});

const weather = tool({
  description: "The weather of a town",
  inputSchema: z.object({ town: z.enum(["Rome", "Oslo"]) }),
});

test("a tool is called with what its schema allows", async () => {
  const { toolCalls, finishReason } = await generateText(
    asked({ tools: { weather }, toolChoice: "required", maxOutputTokens: 400 }),
  );
  assert.equal(finishReason, "tool-calls");
  assert.equal(toolCalls.length, 1);
  assert.equal(toolCalls[0].toolName, "weather");
  assert.ok(["Rome", "Oslo"].includes(toolCalls[0].input.town));
});

test("a tool is called in a stream, too, and its result goes back", async () => {
  const stream = streamText(asked({ tools: { weather }, toolChoice: "required", maxOutputTokens: 400 }));
  const calls = await stream.toolCalls;
  assert.equal(calls.length, 1);
  const { toolCallId, toolName, input } = calls[0];
  const messages = [
    ...shown,
    { role: "assistant", content: [{ type: "tool-call", toolCallId, toolName, input }] },
    {
      role: "tool",
      content: [{ type: "tool-result", toolCallId, toolName, output: { type: "text", value: "Rain." } }],
    },
  ];
  const { text } = await generateText(asked({ messages, tools: { weather } }));
  assert.equal(typeof text, "string");
});

test("an answer has the form of its schema", async () => {
  const schema = z.object({ color: z.enum(["red", "blue"]), sides: z.number().int().min(3).max(4) });
  const { output } = await generateText(asked({ output: Output.object({ schema }), maxOutputTokens: 400 }));
  schema.parse(output);
});

test("who goes away frees the slot", async () => {
  const gone = new AbortController();
  const stream = streamText(
    asked({
      maxOutputTokens: 2000,
      temperature: 1,
      abortSignal: gone.signal,
      providerOptions: { hae: { ignore_eos: true } },
    }),
  );
  for await (const _ of stream.textStream) {
    gone.abort();
    break;
  }
  const busy = async () => (await (await fetch(`${url}/slots`)).json()).some((slot) => slot.is_processing);
  for (let tries = 0; await busy(); tries += 1) {
    assert.ok(tries < 100, "it goes on for nobody");
    await new Promise((done) => setTimeout(done, 50));
  }
});

test("what is wrong is told in the service's shape", async () => {
  const wrong = generateText(asked({ maxOutputTokens: 4, providerOptions: { hae: { hae: { kv_policy: "none" } } } }));
  await assert.rejects(wrong, (error) => {
    assert.ok(APICallError.isInstance(error), `${error}`);
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /kv_policy/);
    return true;
  });
});
