// The mask that is painted over the picture to start from: strokes, an eraser and undo, by pointer or by keyboard.

import { alone, find, toggle } from "../dom.js";

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const SIGNS = { e: () => toggle(eraser), i: () => add("invert"), "[": () => resize(-2), "]": () => resize(2) };
const COLOUR = "#08f";
const HALF = 128; // of 255: from here on the server redraws

const panel = find("source-panel");
const canvas = find("source-mask");
const cursor = find("mask-cursor");
const brush = find("brush");
const eraser = find("mask-eraser");
const large = find("mask-large");
const ink = canvas.getContext("2d", { willReadFrequently: true });

let deeds = []; // strokes {erase, width, points}, "invert", "clear", an ImageBitmap: all drawn again where the last is undone
let stroke = null; // that is being painted
let at = [0, 0]; // where the brush is
let changed = () => {};

export let painted = false; // whether any of the picture is

/** `onchange()` is told when something was painted or taken back. */
export function begin(onchange) {
  changed = onchange;
  find("mask-undo").addEventListener("click", undo);
  find("mask-invert").addEventListener("click", () => add("invert"));
  eraser.addEventListener("click", () => toggle(eraser));
  large.addEventListener("click", enlarge);
  document.addEventListener("keydown", leave, true);
  brush.addEventListener("input", point);
  canvas.addEventListener("pointerdown", press);
  canvas.addEventListener("pointermove", move);
  for (const name of ["pointerup", "pointercancel", "blur"]) canvas.addEventListener(name, lift);
  for (const name of ["pointerleave", "blur"]) canvas.addEventListener(name, () => (cursor.hidden = true));
  canvas.addEventListener("keydown", type);
  canvas.addEventListener("keyup", ({ key }) => key === " " && lift());
  canvas.addEventListener("focus", point);
}

/** Begin anew, for a picture of this size; with what is cut out of a mask, an ImageBitmap. */
export function fit(width, height, cut = null) {
  [canvas.width, canvas.height] = [width, height];
  panel.style.setProperty("--ratio", width / height);
  at = [width / 2, height / 2];
  forget(cut ? [cut] : []);
}

export function forget(left = []) {
  [deeds, stroke] = [left, null];
  if (large.ariaPressed === "true") enlarge();
  draw();
}

/** Take all paint away; it can be undone. */
export const clear = () => add("clear");

function undo() {
  stroke = null;
  deeds.pop();
  draw();
}

function add(deed) {
  if (stroke || (deed === "clear" && !painted)) return;
  deeds.push(deed);
  draw();
}

function draw() {
  wipe();
  for (const deed of deeds) {
    if (deed === "clear") wipe();
    else if (deed === "invert") invert();
    else if (deed instanceof ImageBitmap) lay(deed);
    else deed.points.forEach((_, index) => segment(deed, index));
  }
  tell();
}

const wipe = () => ink.clearRect(0, 0, canvas.width, canvas.height);

function invert() {
  ink.globalCompositeOperation = "xor";
  ink.fillStyle = COLOUR;
  ink.fillRect(0, 0, canvas.width, canvas.height);
}

/** Paint, where nothing is painted yet, what is cut out of a mask. */
function lay(cut) {
  invert();
  ink.globalCompositeOperation = "destination-out";
  ink.drawImage(cut, 0, 0);
}

/** Draw a stroke's line to one of its points; to the first, a dot. */
function segment({ erase, width, points }, index) {
  ink.globalCompositeOperation = erase ? "destination-out" : "source-over";
  [ink.lineWidth, ink.lineCap, ink.strokeStyle, ink.fillStyle] = [width, "round", COLOUR, COLOUR];
  ink.beginPath();
  if (index === 0) {
    ink.arc(...points[0], width / 2, 0, 2 * Math.PI);
    ink.fill();
  } else {
    ink.moveTo(...points[index - 1]);
    ink.lineTo(...points[index]);
    ink.stroke();
  }
}

function tell() {
  const { data } = ink.getImageData(0, 0, canvas.width, canvas.height);
  let many = 0;
  for (let place = 3; place < data.length; place += 4) many += data[place] >= HALF;
  painted = many > 0;
  find("mask-say").textContent = painted ? `Redraws ${Math.max(1, Math.round((many / data.length) * 400))} % of the picture.` : "";
  changed();
}

// The brush

const scale = () => canvas.width / canvas.clientWidth; // the picture's pixels in one of the page's

function put() {
  stroke = { erase: eraser.ariaPressed === "true", width: brush.value * scale(), points: [at] };
  deeds.push(stroke);
  segment(stroke, 0);
}

function drag() {
  stroke.points.push(at);
  segment(stroke, stroke.points.length - 1);
}

function lift() {
  if (stroke) tell();
  stroke = null;
}

/** Show where the brush is, and how large. */
function point() {
  cursor.hidden = document.activeElement !== canvas && !canvas.matches(":hover");
  const [left, top] = at.map((place) => place / scale());
  Object.assign(cursor.style, { left: `${canvas.offsetLeft + left}px`, top: `${canvas.offsetTop + top}px`, width: `${brush.value}px` });
}

function press(event) {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  at = [event.offsetX * scale(), event.offsetY * scale()];
  put();
}

function move(event) {
  at = [event.offsetX * scale(), event.offsetY * scale()];
  if (stroke && canvas.hasPointerCapture(event.pointerId)) drag();
  point();
}

/** Arrows move the brush, Space paints; Ctrl+Z and letters do what the buttons do. */
function type(event) {
  const { key } = event;
  if (event.ctrlKey || event.metaKey) {
    if (key.toLowerCase() !== "z") return;
    undo();
  } else if (MOVES[key]) {
    const step = (brush.value * scale()) / 2;
    const most = [canvas.width, canvas.height];
    at = at.map((place, axis) => Math.min(most[axis], Math.max(0, place + MOVES[key][axis] * step)));
    if (stroke) drag();
  } else if (key === " ") {
    if (!stroke) put();
  } else if (SIGNS[key.toLowerCase()]) {
    SIGNS[key.toLowerCase()]();
  } else {
    return;
  }
  event.preventDefault();
  point();
}

function resize(change) {
  brush.value = Number(brush.value) + change;
}

// The larger canvas

/** Over the whole page, which then is out of reach; or back. */
function enlarge() {
  const on = panel.classList.toggle("large", toggle(large));
  alone(panel, on);
  [panel.role, panel.ariaModal, panel.ariaLabel] = on ? ["dialog", "true", "Mask"] : [null, null, null];
  (on ? canvas : large).focus();
}

function leave(event) {
  if (event.key !== "Escape" || large.ariaPressed !== "true" || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  event.stopPropagation(); // it cancels jobs elsewhere
  enlarge();
}

/** A PNG of the picture's size: opaque, with what was painted cut out of it. */
export function cutOut() {
  const mask = document.createElement("canvas");
  [mask.width, mask.height] = [canvas.width, canvas.height];
  const context = mask.getContext("2d");
  context.fillRect(0, 0, mask.width, mask.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(canvas, 0, 0);
  return new Promise((resolve) => mask.toBlob(resolve, "image/png"));
}
