// llama.cpp's prompt and decode speed on a GGUF file, by the prebuilt library inside an npm package:
//   npm install --ignore-scripts node-llama-cpp@3.22.1
//   taskset -c 0 node llama_cpp.mjs MODEL.gguf f16 2048 32 1 3   (cache type, prompt and new tokens, threads, rounds)
import {getLlama, GgmlType} from "node-llama-cpp";

const [, , path, cacheType, promptTokens, newTokens, threads, rounds] = process.argv;
const [prompt, generated, cores] = [promptTokens, newTokens, threads].map(Number);
const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error", maxThreads: cores});
const model = await llama.loadModel({modelPath: path});
const options = {contextSize: prompt + generated + 64, batchSize: 512, threads: cores, flashAttention: true};
if (cacheType !== "f16") {
  // By number: a name that the library doesn't know, such as one in small letters, it takes for f16 without a word
  const type = GgmlType[cacheType.toUpperCase()];
  if (type === undefined) throw new Error(`llama.cpp has no type ${cacheType}`);
  options.experimentalKvCacheKeyType = type;
  options.experimentalKvCacheValueType = type;
}
const sequence = (await model.createContext(options)).getSequence();

let state = Date.now() % 2147483648;
const randomToken = () => 300 + (state = (state * 1103515245 + 12345) % 2147483648) % 700;
const result = {cache: cacheType, prompt_tokens: prompt, threads: cores, prompt_tokens_per_second: [], decode_tokens_per_second: []};
for (let round = 0; round < Number(rounds ?? 3); round++) {
  await sequence.clearHistory();
  const tokens = Array.from({length: prompt}, randomToken);
  let start = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(tokens);
  result.prompt_tokens_per_second.push(prompt / (performance.now() - start) * 1e3);
  let count = 0;
  for await (const _ of sequence.evaluate([tokens[5]], {temperature: 0, yieldEogToken: true})) {
    if (count === 0) start = performance.now();
    if (++count > generated) break;
  }
  result.decode_tokens_per_second.push(generated / (performance.now() - start) * 1e3);
}
console.log(JSON.stringify(result));
process.exit(0);
