// The picture to start from, and a mask that is painted over it or comes from a file.

import { find, say } from "./dom.js";

const file = find("source-file");
const maskFile = find("mask-file");
const image = find("source-image");
const canvas = find("source-mask");
const brush = canvas.getContext("2d");

let picture = null; // a Blob
let painted = false;
let most = Infinity; // bytes
let changed = () => {};

export function begin(onchange) {
  changed = onchange;
  file.addEventListener("change", () => use(file.files[0] ?? null));
  find("source-remove").addEventListener("click", () => {
    use(null);
    file.focus();
  });
  maskFile.addEventListener("change", check);
  find("mask-clear").addEventListener("click", clear);
  canvas.addEventListener("pointerdown", press);
  canvas.addEventListener("pointermove", paint);
  image.addEventListener("load", fit);
  document.addEventListener("paste", (event) => take(event, event.clipboardData));
  document.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
  document.addEventListener("drop", (event) => take(event, event.dataTransfer));
}

/** Whether the server edits pictures, and how large ones: while a larger one is sent it would hang up. */
export function offered({ edits, limits }) {
  most = limits.max_image_bytes;
  find("source").hidden = find("detail-edit").hidden = !edits;
  if (edits) check();
  else use(null);
}

function check() {
  const mebibytes = (bytes) => `${(bytes / 2 ** 20).toPrecision(3)} MiB`;
  for (const [input, blob] of [[file, picture], [maskFile, maskFile.files[0]]]) {
    const large = blob?.size > most;
    input.setCustomValidity(large ? `The file has ${mebibytes(blob.size)}; this server takes ${mebibytes(most)}` : "");
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

/** {image, mask} as Blobs, or null where pictures start from noise. */
export async function source() {
  if (!picture) return null;
  return { image: picture, mask: maskFile.files[0] ?? (painted ? await cutOut() : null) };
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
  painted = true;
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
