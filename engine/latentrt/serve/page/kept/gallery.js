// The history as a grid, and one picture with its settings.

import { button, find, make, say, short, titleOf, toForm, toggle } from "../dom.js";
import { History } from "./history.js";
import { zip } from "./zip.js";

const MOST = 200; // pictures
const MOST_BYTES = 256 * 2 ** 20;
const MOST_SOURCE = 4 * 2 ** 20; // of the picture that one starts from, its mask and its depth map

const list = find("history");
const detail = find("detail");
const tiles = new Map(); // record → its <li>, newest first in the page, oldest first here
let opening = null;
let history = null;
let hooks = {};
let shown = null;
let other = null; // that is compared with it
let only = false; // whether favourites alone are shown
let ontop = false; // it was opened by the newest picture's button

/** `reuse(record)`, `edit(record)`, `follow(record, name)` and `show(record, name)` are what a picture's buttons do. */
export async function begin(given) {
  hooks = given;
  const question = find("clear-dialog");
  find("clear").addEventListener("click", () => {
    question.returnValue = "";
    question.showModal();
  });
  question.addEventListener("close", () => question.returnValue === "delete" && clear());
  const act = (id, work) => find(id).addEventListener("click", () => work(shown));
  find("newest").addEventListener("click", () => {
    open(newest());
    ontop = true;
  });
  find("favourites").addEventListener("click", () => {
    only = toggle(find("favourites"));
    list.classList.toggle("only", only);
  });
  find("save-all").addEventListener("click", saveAll);
  act("detail-favourite", favour);
  act("detail-zoom", zoom);
  act("detail-compare", compare);
  act("detail-close", () => detail.close());
  act("detail-reuse", (record) => leave(hooks.reuse, record));
  act("detail-edit", (record) => leave(hooks.edit, record));
  act("detail-copy", copy);
  act("detail-delete", remove);
  detail.addEventListener("keydown", turn);
  detail.addEventListener("cancel", endZoom);
  detail.addEventListener("close", closed);
  detail.addEventListener("click", (event) => event.target === detail && detail.close());
  opening = History.open();
  history = await opening;
  const records = await history.all();
  for (const record of records.sort((one, other) => one.made - other.made)) place(record);
  tally();
}

/** Offer a picture to each of the model's ControlNets and IP-Adapters. */
export function offered({ controls, ip_adapters }) {
  const each = (names, text, hook) => names.map((name) => button(names.length > 1 ? `${text}: ${name}` : text, () => leave(hooks[hook], shown, name)));
  find("detail-follow").replaceChildren(...each(controls, "Follow it", "follow"), ...each(ip_adapters, "Show it", "show"));
}

/** Show a new picture and keep it; the oldest go where there are too many. */
export async function add(record) {
  await opening;
  if (sum(sourceOf(record)) > MOST_SOURCE) record.image = record.mask = record.depth = null;
  place(record);
  tally();
  await history.put(record).catch(() => say("The picture could not be kept: the browser has no room"));
  let size = 0;
  for (const one of tiles.keys()) size += sizeOf(one);
  for (const oldest of [...tiles.keys()].filter(({ favourite }) => !favourite)) {
    if (tiles.size <= MOST && size <= MOST_BYTES) break;
    size -= sizeOf(oldest);
    await drop(oldest);
  }
  tally();
}

/** Bytes of a picture and of those that were given for it. */
function sizeOf(record) {
  const units = [record.control ?? {}, record.ip_adapter ?? {}].flatMap(Object.values);
  return sum([record.blob, ...sourceOf(record), ...units.map(({ image }) => image)]);
}

const sourceOf = ({ image, mask, depth }) => [image, mask, depth];
const sum = (blobs) => blobs.reduce((size, blob) => size + (blob?.size ?? 0), 0);

function place(record) {
  const image = make("img", { alt: "", loading: "lazy", src: URL.createObjectURL(record.blob) });
  const caption = make("span", { className: "caption" }, titleOf(record.wanted));
  const tile = button("", () => open(record), { className: "tile", "aria-label": nameOf(record), "aria-haspopup": "dialog" });
  tile.append(image, caption);
  const item = make("li", { className: record.favourite ? "favourite" : "" }, tile);
  tiles.set(record, item);
  list.prepend(item);
}

const nameOf = ({ wanted, favourite }) => `${short(titleOf(wanted))}, seed ${wanted.seed}${favourite ? ", favourite" : ""}`;

export const newest = () => [...tiles.keys()].at(-1);

async function drop(record) {
  const item = tiles.get(record);
  URL.revokeObjectURL(item.querySelector("img").src);
  item.remove();
  tiles.delete(record);
  if (other === record) other = null;
  await history.remove(record.id);
}

async function clear() {
  await history.clear();
  for (const record of [...tiles.keys()]) await drop(record);
  tally();
  say("All pictures deleted");
  toForm();
}

/** Say how many there are, and show the newest one above the form, where a phone begins. */
function tally() {
  const last = newest();
  find("newest").hidden = !last;
  if (last) {
    find("newest").setAttribute("aria-label", `Newest: ${nameOf(last)}`);
    find("newest-image").src = addressOf(last);
  }
  find("empty").hidden = tiles.size > 0;
  find("history-all").hidden = tiles.size === 0;
  const kept = history.kept ? "" : ", until this tab is closed";
  find("count").textContent = tiles.size ? `${tiles.size}${kept}` : "";
}

const addressOf = (record) => tiles.get(record).querySelector("img").src;

function open(record) {
  shown = record;
  const address = addressOf(record);
  find("detail-title").textContent = titleOf(record.wanted);
  Object.assign(find("detail-image"), { src: address, alt: titleOf(record.wanted) });
  find("detail-facts").replaceChildren(...facts(record).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
  Object.assign(find("detail-download"), { href: address, download: fileOf(record) });
  toggle(find("detail-favourite"), Boolean(record.favourite));
  showOther();
  find("detail-say").textContent = "";
  if (detail.open) return;
  ontop = false;
  detail.showModal();
}

/** Mark a picture as one that stays, or take the mark away. */
async function favour(record) {
  record.favourite = toggle(find("detail-favourite"));
  const item = tiles.get(record);
  item.classList.toggle("favourite", record.favourite);
  item.querySelector("button").ariaLabel = nameOf(record);
  tally();
  await history.put(record).catch(() => say("The mark could not be kept: the browser has no room"));
}

const zoom = () => detail.classList.toggle("zoomed", toggle(find("detail-zoom")));

/** Escape ends the zoom before it closes the picture. */
function endZoom(event) {
  if (!detail.classList.contains("zoomed")) return;
  event.preventDefault();
  zoom();
  find("detail-zoom").focus();
}

/** Hold this picture beside those that are opened next, or end that. */
function compare(record) {
  other = other ? null : record;
  showOther();
  find("detail-say").textContent = other ? "The next picture that you turn to or open is shown beside this one" : "";
}

function showOther() {
  const beside = other && other !== shown;
  toggle(find("detail-compare"), Boolean(other));
  find("detail-other").hidden = !beside;
  if (beside) Object.assign(find("detail-other"), { src: addressOf(other), alt: `Beside it: ${nameOf(other)}`, title: nameOf(other) });
}

/** The focus goes back to what it came from. */
function closed() {
  if (shown) (ontop ? find("newest") : tiles.get(shown).querySelector("button")).focus();
}

/** What made the picture: what the file itself says, else what was asked for. */
function facts({ wanted, facts: own, control, ip_adapter, size, made, edited, image, warnings }) {
  const rows = [
    ["Negative prompt", wanted.negative_prompt],
    ["Class", wanted.class_label],
    ["Size", size.replace("x", " × ")],
    ["Steps", own.steps ?? wanted.num_inference_steps],
    ["Solver", own.solver ?? wanted.scheduler],
    ["Guidance", own.guidance ?? wanted.guidance_scale],
    ["Seed", wanted.seed],
    ["Starts from", edited ? `a picture${image ? "" : " that is not kept"}, strength ${own.strength ?? wanted.strength ?? "automatic"}` : undefined],
    ...Object.entries(wanted.lora ?? {}).map(([name, strength]) => ["LoRA", `${name}, strength ${strength}`]),
    ...Object.entries(own.control ?? control ?? {}).map(([name, unit]) => ["Follows", `${name}, scale ${unit.scale}, ${unit.start} to ${unit.end}${unit.guess ? ", guess mode" : ""}${unit.type === undefined ? "" : `, as ${unit.type}`}`]),
    ...Object.entries(own.ip_adapter ?? ip_adapter ?? {}).map(([name, { scale }]) => ["Shows", `${name}, scale ${scale}`]),
    ["Enlarged", own.hires_scale && `${own.hires_scale} times, strength ${own.hires_strength}`],
    ["Refiner from", own.handoff],
    ["Model", own.model ?? wanted.model],
    ["Made", new Date(made).toLocaleString()],
    ...warnings.map((warning) => ["Note", warning]),
  ];
  return rows.filter(([, value]) => value !== undefined);
}

const slug = ({ wanted }) => {
  const words = titleOf(wanted).toLowerCase().normalize("NFKD").replace(/[^\p{Letter}\p{Number}]+/gu, "-");
  return `${words.replace(/^-|-$/g, "").slice(0, 60) || "picture"}-${wanted.seed}`;
};

const fileOf = (record) => `${slug(record)}.${record.blob.type.replace("image/", "")}`;

/** All that are shown, oldest first, in one archive. */
async function saveAll() {
  const records = [...tiles.keys()].filter(({ favourite }) => !only || favourite);
  const files = records.map((record, index) => ({ name: `${String(index + 1).padStart(3, "0")}-${fileOf(record)}`, made: record.made, blob: record.blob }));
  const address = URL.createObjectURL(await zip(files));
  make("a", { href: address, download: "latentrt.zip" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000); // the browser may still read it
}

/** The body of a request that makes the picture again. */
async function copy({ wanted, edited, facts: own, control, ip_adapter }) {
  const { partial_images, ...body } = wanted;
  const given = Object.keys({ ...own.control, ...own.ip_adapter, ...control, ...ip_adapter });
  const text = JSON.stringify(body, null, 2);
  const good = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  find("detail-say").textContent = good || copyOldWay(text) ? `Settings copied, as a request’s body${edited || given.length ? " without the pictures that were given" : ""}` : "The browser does not let this page copy";
}

/** Without TLS only this machine's own pages have a clipboard. */
function copyOldWay(text) {
  const area = make("textarea", { value: text });
  detail.append(area);
  area.select();
  const good = document.execCommand("copy");
  area.remove();
  find("detail-copy").focus();
  return good;
}

async function remove(record) {
  const next = neighbour(record, 1) ?? neighbour(record, -1);
  const dropped = drop(record);
  tally();
  if (next) open(next); // at once: who closes it meanwhile does not see it open again
  else leave(toForm);
  await dropped;
  say("Picture deleted");
}

/** Close the one picture and go on elsewhere, not at its tile. */
function leave(work, ...given) {
  shown = null;
  detail.close();
  work(...given);
}

const neighbour = (record, way) => {
  const records = [...tiles.keys()].filter((one) => !only || one.favourite || one === record).reverse();
  return records[records.indexOf(record) + way];
};

function turn(event) {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const next = way && neighbour(shown, way);
  if (!next || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  open(next);
}
