// The settings: what the server offers, what was typed, and what is sent.

import { find, make } from "./dom.js";
import * as loras from "./given/loras.js";

const DRAFT = "latentrt.draft";
const NUMBERS = [
  ...["n", "num_inference_steps", "guidance_scale", "seed", "class_label", "strength", "partial_images"],
  ...["hires_scale", "handoff", "image_guidance", "noise_level"],
];
const TEXTS = ["prompt", "negative_prompt", "scheduler", "model", "output_format"];
const SHAPES = [[1, 1], [3, 2], [2, 3], [16, 9], [9, 16]];
const OTHER = "other";
const LARGER = 1.25; // times the model's own pixels: from here on a word is said

const form = find("form");
export const field = (name) => form.elements.namedItem(name);

let offer = null; // what /latentrt/model said
let fromPicture = false;

/** Take the names, limits and defaults of a model over; what was typed or drafted remains. */
export function offered(model) {
  const typed = offer === null ? draft() : changed();
  offer = model;
  const { limits, step, prompted } = model;
  for (const name of ["prompt", "guidance_scale"]) show(name, prompted);
  for (const name of ["negative_prompt", "image_guidance", "noise_level", "strength"]) show(name, model[name]);
  show("class_label", model.class_labels);
  show("handoff", model.refiner !== null);
  const bounds = {
    n: { max: limits.max_n },
    num_inference_steps: { max: limits.max_steps },
    seed: { max: Number.MAX_SAFE_INTEGER },
    noise_level: { max: limits.max_noise_level ?? "" },
    class_label: { max: model.classes === null ? "" : model.classes - 1 },
    width: { min: step, max: limits.max_side, step },
    height: { min: step, max: limits.max_side, step },
    prompt: { maxLength: limits.max_prompt },
    negative_prompt: { maxLength: limits.max_prompt },
  };
  for (const [name, limit] of Object.entries(bounds)) Object.assign(field(name), limit);
  models(model);
  field("scheduler").replaceChildren(...solvers(model));
  loras.offered(model);
  sizes();
  reset();
  fill(typed);
}

/** What was typed that is not the model's default: another model has others. */
function changed() {
  const wanted = values();
  if (wanted.num_inference_steps === offer.defaults.steps) delete wanted.num_inference_steps;
  if (wanted.guidance_scale === offer.defaults.guidance) delete wanted.guidance_scale;
  return wanted;
}

/** All models by name, where there are several: other names of one are no choice. */
function models({ models: several = [] }) {
  const names = several.length > 1 ? several : [];
  field("model").replaceChildren(...names.map((name) => new Option(name)));
  field("model").closest("label").hidden = !names.length;
}

/** The name of the model that was chosen, or drafted before the server told what it has. */
export const chosen = () => (offer ? values() : draft()).model;

/** Show a field, or take it out of the form where the model does not read it. */
function show(name, wanted) {
  field(name).disabled = !wanted;
  field(name).closest("label").hidden = !wanted;
}

/** The solvers by name, and once more as diffusers calls them. */
function solvers({ schedulers, defaults }) {
  const own = new Option(defaults.scheduler ? `${defaults.scheduler} (default)` : "The model’s own", "");
  const isClass = (name) => /^[A-Z]/.test(name);
  const options = (names) => names.map((name) => new Option(name));
  const classes = make("optgroup", { label: "As diffusers calls them" }, ...options(schedulers.filter(isClass)));
  return [own, ...options(schedulers.filter((name) => !isClass(name))), classes];
}

/** With a picture to start from, the automatic size has its shape. */
export function startsFrom(picture) {
  fromPicture = picture;
  show("hires_scale", !picture);
  if (offer) sizes();
}

function sizes() {
  const chosen = field("size").value;
  const likePicture = offer.enlarges ? `${offer.enlarges} × the picture` : "As the picture";
  const automatic = fromPicture ? likePicture : named(offer.size);
  const listed = offer.sizes.length ? offer.sizes : derived(offer);
  const options = [new Option(automatic, ""), ...listed.map((size) => new Option(named(size), size))];
  if (!offer.sizes.length) options.push(new Option("Other…", OTHER));
  field("size").replaceChildren(...options);
  choose("size", chosen);
}

const named = (size) => size.replace("x", " × ");

/** Usual shapes with the model's own number of pixels and four times as many, as far as the limits go. */
function derived({ size, step, limits }) {
  const [width, height] = size.split("x").map(Number);
  const found = new Set();
  for (const scale of [1, 4]) {
    for (const [wide, high] of SHAPES) {
      const unit = Math.sqrt((width * height * scale) / (wide * high));
      const [w, h] = [wide, high].map((part) => Math.round((part * unit) / step) * step);
      if (Math.max(w, h) <= limits.max_side && w * h <= limits.max_pixels) found.add(`${w}x${h}`);
    }
  }
  found.delete(size);
  return [...found];
}

function choose(name, value) {
  const select = field(name);
  select.value = value;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

/** What stands in the form, by the API's names; what is left to the server is left out. */
export function values() {
  const wanted = {};
  const filled = (name) => !field(name).disabled && field(name).value.trim() !== "";
  for (const name of TEXTS.filter(filled)) wanted[name] = field(name).value.trim();
  for (const name of NUMBERS.filter(filled)) wanted[name] = Number(field(name).value);
  const size = field("size").value;
  if (size === OTHER) wanted.size = `${field("width").value}x${field("height").value}`;
  else if (size) wanted.size = size;
  const lora = loras.strengths();
  if (Object.keys(lora).length) wanted.lora = lora;
  return wanted;
}

/** Write settings into the form; those that are not named are left as they are. */
export function fill(wanted) {
  for (const name of [...TEXTS, ...NUMBERS]) {
    if (wanted[name] === undefined) continue;
    if (field(name).options) choose(name, String(wanted[name]));
    else field(name).value = wanted[name];
  }
  if (wanted.size) fillSize(wanted.size);
  if (wanted.lora) loras.fill(wanted.lora);
  showSides();
}

function fillSize(size) {
  const select = field("size");
  const listed = [...select.options].some((option) => option.value === size);
  choose("size", listed ? size : size === offer?.size && !fromPicture ? "" : OTHER);
  [field("width").value, field("height").value] = size.split("x");
}

/** The server's defaults for all but the prompts. */
export function reset() {
  for (const name of [...NUMBERS, "size", "scheduler", "model", "output_format"]) {
    if (field(name).options) field(name).selectedIndex = 0;
    else field(name).value = "";
  }
  choose("model", offer?.model ?? "");
  field("n").value = 1;
  field("num_inference_steps").value = offer?.defaults.steps ?? "";
  field("guidance_scale").value = offer?.defaults.guidance ?? "";
  field("class_label").value = 0;
  loras.fill({});
  choose("partial_images", "3");
  showSides();
}

function showSides() {
  const other = field("size").value === OTHER;
  find("sides").hidden = !other;
  for (const name of ["width", "height"]) field(name).disabled = !other;
  for (const name of ["width", "height"]) field(name).required = other;
  warn();
}

/** A word about time and memory before a picture that is larger than the model's own. */
function warn() {
  const { size, hires_scale } = values();
  const pixels = (text) => text.split("x").reduce((product, side) => product * Number(side), 1);
  const times = offer ? (pixels(size ?? offer.size) * (hires_scale ?? 1) ** 2) / pixels(offer.size) : 1;
  find("cost").hidden = !(times >= LARGER);
  if (find("cost").hidden) return;
  const twice = hires_scale || fromPicture ? "" : " Things may appear twice; “Enlarge and draw on”, under More, avoids that.";
  find("cost").textContent = `${Number(times.toPrecision(2))} times the pixels of the model’s own ${named(offer.size)}: expect at least as many times the time and memory.${twice}`;
}

function draft() {
  try {
    return JSON.parse(localStorage.getItem(DRAFT)) ?? {};
  } catch {
    return {};
  }
}

/** Keep what is typed, and let a closed part open where a value in it cannot be sent. */
export function begin() {
  form.addEventListener("input", () => (keep(), warn()));
  form.addEventListener("change", showSides);
  form.addEventListener("invalid", ({ target }) => target.closest("details")?.setAttribute("open", ""), true);
  showSides();
}

export function keep() {
  localStorage.setItem(DRAFT, JSON.stringify(values()));
}
