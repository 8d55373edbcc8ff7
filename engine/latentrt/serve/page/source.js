// The picture to start from, and a mask that is painted over it or comes from a file.

import { find, say } from "./dom.js";

const file = find("source-file");
const maskFile = find("mask-file");
const depthFile = find("depth-file");
const image = find("source-image");
const canvas = find("source-mask");
const brush = canvas.getContext("2d");

let picture = null; // a Blob
let painted = false;
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
  find("mask-clear").addEventListener("click", clear);
  canvas.addEventListener("pointerdown", press);
  canvas.addEventListener("pointermove", paint);
  image.addEventListener("load", fit);
  document.addEventListener("paste", (event) => take(event, event.clipboardData));
  document.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
  document.addEventListener("drop", (event) => take(event, event.dataTransfer));
}

/** Which pictures the server takes, and how large ones: while a larger one is sent it would hang up. */
export function offered(model) {
  const { edits, limits, masks, needs_depth, needs_picture } = model;
  [most, needs] = [limits.max_image_bytes, model];
  find("source").hidden = find("detail-edit").hidden = !edits;
  find("mask-parts").hidden = canvas.hidden = !masks;
  depthFile.closest("label").hidden = !needs_depth;
  if (needs_picture) find("source").open = true;
  if (edits) check();
  else use(null);
}

function check() {
  const mebibytes = (bytes) => `${(bytes / 2 ** 20).toPrecision(3)} MiB`;
  const [mask, depth] = [maskFile.files[0], depthFile.files[0]];
  const missing = (needed, given, what) => (needed && !given ? `This model needs ${what}` : "");
  for (const [input, blob, lack] of [
    [file, picture, missing(needs.needs_picture, picture, "a picture")],
    [maskFile, mask, picture ? missing(needs.needs_mask, mask || painted, "a mask") : ""],
    [depthFile, depth, picture ? missing(needs.needs_depth, depth, "a depth map") : ""],
  ]) {
    const large = blob?.size > most;
    input.setCustomValidity(large ? `The file has ${mebibytes(blob.size)}; this server takes ${mebibytes(most)}` : lack);
  }
}

/** Start from this picture; null: from none. */
export function use(blob) {
  URL.revokeObjectURL(image.src);
  picture = blob;
  find("source-panel").hidden = !blob;
  if (blob) image.src = URL.createObjectURL(blob);
  else image.removeAttribute("src");
  if (blob) find("source").open = true;
  if (file.files[0] !== blob) file.value = "";
  clear();
  changed(Boolean(blob));
}

/** {image, mask, depth} as Blobs, or {} where pictures start from noise. */
export async function source() {
  if (!picture) return {};
  const mask = needs.masks ? (maskFile.files[0] ?? (painted ? await cutOut() : null)) : null;
  return { image: picture, mask, depth: needs.needs_depth ? depthFile.files[0] : null };
}

function take(event, data) {
  const given = [...data.files].find((one) => one.type.startsWith("image/"));
  if (!given || find("source").hidden) return;
  event.preventDefault();
  use(given);
  say("Starts from the picture that was given");
}

function fit() {
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  painted = false;
  check();
}

function clear() {
  maskFile.value = "";
  brush.clearRect(0, 0, canvas.width, canvas.height);
  painted = false;
  check();
}

function press(event) {
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  const scale = canvas.width / canvas.clientWidth;
  brush.lineWidth = find("brush").value * scale;
  brush.lineCap = brush.lineJoin = "round";
  brush.strokeStyle = "#08f";
  brush.beginPath();
  brush.moveTo(event.offsetX * scale, event.offsetY * scale);
  paint(event);
}

function paint(event) {
  if (!canvas.hasPointerCapture(event.pointerId)) return;
  const scale = canvas.width / canvas.clientWidth;
  brush.lineTo(event.offsetX * scale, event.offsetY * scale);
  brush.stroke();
  if (painted) return;
  painted = true;
  check();
}

/** A PNG of the picture's size: opaque, with what was painted cut out of it. */
function cutOut() {
  const mask = document.createElement("canvas");
  [mask.width, mask.height] = [canvas.width, canvas.height];
  const context = mask.getContext("2d");
  context.fillRect(0, 0, mask.width, mask.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(canvas, 0, 0);
  return new Promise((resolve) => mask.toBlob(resolve, "image/png"));
}
