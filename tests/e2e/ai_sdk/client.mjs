// Asks a live server through the Vercel AI SDK and prints, as JSON, what it was told.
//     node client.mjs BASE_URL MODEL QUESTION
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, name, prompt] = process.argv.slice(2);
const warnings = [];
globalThis.AI_SDK_LOG_WARNINGS = (given) => warnings.push(...[given].flat());
process.on("warning", (warning) => warnings.push(String(warning)));

async function ask(includeUsage) {
  const server = createOpenAICompatible({ name: "fraqtl", baseURL, includeUsage });
  const request = { model: server(name), prompt, temperature: 0, maxRetries: 0 };
  const plain = await generateText(request);
  const errors = [];
  const stream = streamText({ ...request, includeRawChunks: true, onError: ({ error }) => errors.push(String(error)) });
  let text = "";
  const raw = [];
  for await (const part of stream.fullStream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "raw" && part.rawValue.fraqtl) raw.push(part.rawValue.fraqtl);
  }
  return {
    plain: {
      text: plain.text,
      finish: plain.finishReason,
      usage: plain.usage,
      headers: plain.response.headers,
      body: plain.response.body,
    },
    stream: { text, finish: await stream.finishReason, usage: await stream.usage, raw, errors },
  };
}

const answers = { without_usage: await ask(false), with_usage: await ask(true), warnings };
console.log(JSON.stringify(answers));
