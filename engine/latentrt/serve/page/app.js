// The page: its parts are put together here.

import { ask, key, setKey } from "./api.js";
import { find, say, short, titleOf, toForm } from "./dom.js";
import * as form from "./form.js";
import { controls, shown } from "./given/pictures.js";
import * as source from "./given/source.js";
import * as jobs from "./jobs.js";
import * as gallery from "./kept/gallery.js";
import * as theme from "./theme.js";
import * as watch from "./watch.js";

let model = null; // what /latentrt/model said
let state = "";

async function draw() {
  const { strength, ...wanted } = form.values();
  const given = { ...(await source.source()), control: controls.given(), ip_adapter: shown.given() };
  if (given.image && strength !== undefined) wanted.strength = strength;
  const job = jobs.start(wanted, given);
  say(`Drawing ${short(titleOf(wanted))}`);
  if (matchMedia("(max-width: 50rem)").matches) job.card.scrollIntoView({ block: "nearest" });
}

async function learn(now) {
  const before = state;
  state = now;
  if (now === "locked" && before !== "locked") openKey();
  if (["locked", "offline"].includes(now) || (model && before !== "offline")) return;
  const told = await described(form.chosen()).catch(() => null); // asked again with the next look at the queue
  if (told) offer(told);
}

/** What a model can: this one, or the first where the server has none of this name. */
async function described(name) {
  const about = async (query) => (await ask(`latentrt/model${query}`)).json();
  if (!name) return about("");
  return about(`?model=${encodeURIComponent(name)}`).catch((error) => {
    if (error.code === "model_not_found") return about("");
    throw error;
  });
}

function offer(told) {
  model = told;
  find("model-name").textContent = model.model;
  for (const part of [form, source, controls, shown, gallery]) part.offered(model);
}

/** Turn to another model; the server may have to load it first. */
async function turn(name) {
  if (!model.models?.includes(name) || name === model.model) return;
  form.fill({ model: name });
  find("model-say").textContent = `Asks after ${name}; it may have to be loaded`;
  let why = "";
  const told = await described(name).catch((error) => (why = `${name} cannot be had: ${error.found ?? error}`) && null);
  if (form.chosen() !== name) return; // another was chosen meanwhile
  find("model-say").textContent = why;
  if (told) offer(told);
  else form.fill({ model: model.model });
}

function openKey() {
  find("key").value = key();
  find("key-say").textContent = key() && state === "locked" ? "The server refused this key." : "";
  find("key-dialog").returnValue = "";
  if (!document.querySelector("dialog[open]")) find("key-dialog").showModal();
}

function keyClosed() {
  const choice = find("key-dialog").returnValue;
  if (!choice) return;
  setKey(choice === "use" ? find("key").value : "");
  state = "";
  watch.look();
}

async function reuse({ wanted, edited, image, mask, depth, control = {}, ip_adapter = {}, facts }) {
  await turn(wanted.model);
  await source.use(model.edits && image ? image : null, mask, depth);
  form.reset();
  form.fill({ negative_prompt: "", ...wanted, n: 1 });
  form.keep();
  const lost = [...controls.fill(control, facts.control), ...shown.fill(ip_adapter, facts.ip_adapter)].map((name) => `of ${name}`);
  if (edited && !(model.edits && image)) lost.unshift("to start from");
  toForm();
  say(`The settings stand in the form${lost.length ? `, but not the picture ${lost.join(" and ")}` : ""}`);
}

function edit({ blob, wanted }) {
  source.use(blob);
  form.fill({ prompt: wanted.prompt, class_label: wanted.class_label });
  toForm();
  say("The picture is the one to start from");
}

function shortcut(event) {
  if (event.isComposing || document.querySelector("dialog[open], .large")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    find("form").requestSubmit();
  } else if (event.key === "Escape") {
    jobs.cancelOne();
  }
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
find("defaults").addEventListener("click", () => {
  form.reset();
  form.keep();
  say("The server’s defaults stand in the form");
});
find("key-open").addEventListener("click", openKey);
find("key-cancel").addEventListener("click", () => find("key-dialog").close(""));
find("key-dialog").addEventListener("close", keyClosed);
form.field("model").addEventListener("change", ({ target }) => turn(target.value));
document.addEventListener("keydown", shortcut);
for (const [id, seed] of [["seed-any", () => ""], ["seed-same", () => gallery.newest()?.wanted.seed]]) {
  find(id).addEventListener("click", () => {
    form.fill({ seed: seed() });
    form.keep();
  });
}
theme.begin();
form.begin();
source.begin(form.startsFrom);
jobs.begin({ drawn: gallery.add, stirred: watch.look, field: form.field });
watch.begin({ busy: jobs.busy, queue: jobs.told, state: learn, mine: jobs.byId });
gallery.begin({ reuse, edit, follow: ({ blob }, name) => controls.use(name, blob), show: ({ blob }, name) => shown.use(name, blob) });
