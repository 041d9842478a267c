// Next-token log-probabilities of every position, by llama.cpp through node-llama-cpp.
// node llama_cpp.mjs TEXTS.json OUT.json FILE.gguf ...; TEXTS.json: a list of texts, special tokens
// written out. OUT.json: {FILE: [{tokens, tops: per position [[token, probability], ...]}]}.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const MOST = 200; // the likeliest tokens of a position that are kept
// Where the package is, not where this file is, decides what is imported.
const here = createRequire(path.join(process.cwd(), "node_modules", "any.js"));
const folder = path.join(process.cwd(), "node_modules", "node-llama-cpp");
const { main, exports: entries } = here(path.join(folder, "package.json"));
const entry = entries?.["."]?.import ?? entries?.["."]?.default ?? main;
const { getLlama } = await import(pathToFileURL(path.join(folder, entry)).href);

const [textsFile, outFile, ...files] = process.argv.slice(2);
const texts = JSON.parse(fs.readFileSync(textsFile, "utf8"));
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true });
const out = {};
for (const file of files) {
    const model = await llama.loadModel({ modelPath: file });
    const context = await model.createContext({ contextSize: 512, sequences: 1 });
    const sequence = context.getSequence();
    out[file] = [];
    for (const text of texts) {
        await sequence.clearHistory();
        const tokens = Array.from(model.tokenize(text, true));
        const asked = tokens.map((token) => [token, { generateNext: { probabilities: true } }]);
        const found = await sequence.controlledEvaluate(asked);
        const tops = found.map((one) => [...one.next.probabilities].slice(0, MOST));
        out[file].push({ tokens, tops });
    }
    await model.dispose();
}
fs.writeFileSync(outFile, JSON.stringify(out));
process.exit(0);
