// The picture to start from, and a mask that is painted over it (mask.js) or comes from a file.

import { find, hand, say, tooLarge } from "../dom.js";
import * as mask from "./mask.js";

const file = find("source-file");
const maskFile = find("mask-file");
const depthFile = find("depth-file");
const image = find("source-image");

let picture = null; // a Blob
let most = Infinity; // bytes
let needs = {};
let changed = () => {};

export function begin(onchange) {
  changed = onchange;
  file.addEventListener("change", () => use(file.files[0] ?? null));
  find("source-remove").addEventListener("click", () => {
    use(null);
    file.focus();
  });
  for (const input of [maskFile, depthFile]) input.addEventListener("change", check);
  find("mask-clear").addEventListener("click", () => {
    maskFile.value = "";
    mask.clear();
    check();
  });
  mask.begin(check);
  document.addEventListener("paste", (event) => take(event, event.clipboardData));
  document.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
  document.addEventListener("drop", (event) => take(event, event.dataTransfer));
}

/** Which pictures the server takes, and how large ones. */
export function offered(model) {
  const { edits, limits, masks, needs_depth, needs_picture } = model;
  [most, needs] = [limits.max_image_bytes, model];
  find("source").hidden = find("detail-edit").hidden = !edits;
  find("mask-parts").hidden = find("source-mask").hidden = !masks;
  depthFile.closest("label").hidden = !needs_depth;
  if (needs_picture) find("source").open = true;
  if (edits) check();
  else use(null);
}

function check() {
  const [drawn, depth] = [maskFile.files[0], depthFile.files[0]];
  const missing = (needed, given, what) => (needed && !given ? `This model needs ${what}` : "");
  for (const [input, blob, lack] of [
    [file, picture, missing(needs.needs_picture, picture, "a picture")],
    [maskFile, drawn, picture ? missing(needs.needs_mask, drawn || mask.painted, "a mask") : ""],
    [depthFile, depth, picture ? missing(needs.needs_depth, depth, "a depth map") : ""],
  ]) {
    input.setCustomValidity(tooLarge(blob, most) || lack);
  }
}

/** Start from this picture, with a mask and a depth map that were given before; null: from none. */
export async function use(blob, drawn = null, depth = null) {
  URL.revokeObjectURL(image.src);
  picture = blob;
  find("source-panel").hidden = !blob;
  if (blob) image.src = URL.createObjectURL(blob);
  else image.removeAttribute("src");
  if (blob) find("source").open = true;
  if (file.files[0] !== blob) file.value = "";
  maskFile.value = "";
  if (depth) hand(depthFile, depth);
  mask.forget();
  changed(Boolean(blob));
  if (!blob) return;
  const loaded = new Promise((resolve) => (image.onload = image.onerror = resolve));
  const [cut] = await Promise.all([drawn && createImageBitmap(drawn), loaded]);
  if (picture === blob && image.naturalWidth) mask.fit(image.naturalWidth, image.naturalHeight, cut);
}

/** {image, mask, depth} as Blobs, or {} where pictures start from noise. */
export async function source() {
  if (!picture) return {};
  const drawn = needs.masks ? (maskFile.files[0] ?? (mask.painted ? await mask.cutOut() : null)) : null;
  return { image: picture, mask: drawn, depth: needs.needs_depth ? depthFile.files[0] : null };
}

function take(event, data) {
  const given = [...data.files].find((one) => one.type.startsWith("image/"));
  if (!given || find("source").hidden) return;
  event.preventDefault();
  use(given);
  say("Starts from the picture that was given");
}
