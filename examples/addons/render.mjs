// node render.mjs FOLDER SIDE < SVGS > PIXELS: draw SVGs on white. FOLDER has the package @resvg/resvg-wasm; SVGS is a
// JSON list of texts, PIXELS has 4 * SIDE * SIDE bytes of each: red, green, blue and 255.
import { readFileSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, side] = process.argv.slice(2);
const { Resvg, initWasm } = await import(pathToFileURL(`${folder}/package/index.mjs`));
await initWasm(readFileSync(`${folder}/package/index_bg.wasm`));
for (const svg of JSON.parse(readFileSync(0, "utf8"))) {
  const fitTo = { mode: "width", value: Number(side) };
  const drawn = new Resvg(svg, { background: "white", fitTo }).render().pixels;
  let pixels = Buffer.alloc(4 * side * side, 255);
  pixels.set(drawn.subarray(0, pixels.length));  // two are a row too high
  while (pixels.length) pixels = pixels.subarray(writeSync(1, pixels));
}
