// Jobs: each is one request, a card with its previews and progress, and an end.

import { Refusal, ask, broken, events } from "./api.js";
import { button, count, find, make, say, short, titleOf, toForm } from "./dom.js";
import { encoded } from "./given/pictures.js";
import { settingsOf } from "./kept/png.js";

const MOST_AT_ONCE = 4; // a browser has six connections to a server, and cancelling needs one
const CANCEL_PATIENCE = 2000; // ms

const jobs = new Set(); // newest last; all that have a card
let hooks = {};

/** `drawn(picture)` is told of each picture, `stirred()` of every beginning and end, `field(name)` finds a setting. */
export function begin(given) {
  hooks = given;
}

export const busy = () => [...jobs].some((job) => job.open);
export const byId = (id) => [...jobs].find((job) => job.id === id);

/** The job in whose card something has the focus, else the newest that is not done. */
export function cancelOne() {
  const focused = document.activeElement?.closest?.(".job");
  const open = [...jobs].filter((job) => job.open);
  (open.find((job) => job.card === focused) ?? open.at(-1))?.cancel();
}

/** Queue's entries: {id, state, row, rows, progress, pictures, done}, oldest first. */
export function told(entries) {
  const ahead = entries.filter((entry) => entry.state === "waiting").map((entry) => entry.id);
  for (const entry of entries) byId(entry.id)?.follow(entry, ahead.indexOf(entry.id));
}

/** `given` are pictures: {image, mask, depth}, each only where there is one, and {control, ip_adapter}, by name. */
export function start(wanted, given) {
  const job = new Job(wanted, given);
  jobs.add(job);
  find("jobs").prepend(job.card);
  next();
  return job;
}

function next() {
  const open = [...jobs].filter((job) => job.open);
  const free = MOST_AT_ONCE - open.filter((job) => job.sent).length;
  for (const job of open.filter((one) => !one.sent).slice(0, Math.max(0, free))) job.run();
  find("jobs-section").hidden = !jobs.size;
  document.title = open.length ? `(${open.length}) latentrt` : "latentrt";
  hooks.stirred();
}

class Job {
  constructor(wanted, given) {
    const random = crypto.getRandomValues(new Uint32Array(3));
    this.id = `page_${[...random].map((word) => word.toString(16).padStart(8, "0")).join("")}`;
    this.wanted = wanted;
    this.given = given;
    this.name = short(titleOf(wanted));
    this.open = true;
    this.sent = false;
    this.left = wanted.n ?? 1;
    this.abort = new AbortController();
    this.card = this.#card();
  }

  #card() {
    this.frames = Array.from({ length: this.left }, () => make("div", { className: "frame" }));
    this.state = make("p", { className: "quiet state-line" }, "Waits in this page");
    this.progress = make("progress", { max: 1, "aria-label": `Progress of ${this.name}` });
    this.actions = make("div", { className: "row" }, button("Cancel", () => this.cancel(), { "aria-label": `Cancel ${this.name}` }));
    const text = make("div", { className: "body" }, make("h3", {}, this.name), this.state, this.progress, this.actions);
    return make("li", { className: "job" }, make("div", { className: "frames" }, ...this.frames), text);
  }

  async run() {
    this.sent = true;
    this.#tell("Sent");
    hooks.stirred();
    try {
      const response = await this.#request();
      await this.#read(response);
      this.#done();
    } catch (error) {
      this.#failed(error);
    }
    next();
  }

  async #request() {
    const { image, mask, depth, ...units } = this.given;
    const wanted = { output_format: "png", ...this.wanted, stream: true };
    for (const [key, given] of Object.entries(units)) if (Object.keys(given).length) wanted[key] = await encoded(given);
    const options = { method: "POST", headers: { "x-request-id": this.id }, signal: this.abort.signal };
    if (!image) {
      options.headers["content-type"] = "application/json";
      return ask("v1/images/generations", { ...options, body: JSON.stringify(wanted) });
    }
    const body = new FormData();
    for (const [name, value] of Object.entries(wanted)) body.set(name, typeof value === "object" ? JSON.stringify(value) : String(value));
    body.set("image", image, "image");
    if (mask) body.set("mask", mask, "mask.png");
    if (depth) body.set("depth", depth, "depth.png");
    return ask("v1/images/edits", { ...options, body });
  }

  async #read(response) {
    try {
      for await (const { event, data } of events(response.body)) {
        if (event === "error") throw Refusal.of(data.error);
        const blob = new Blob([bytes(data.b64_json)], { type: `image/${this.wanted.output_format ?? "png"}` });
        this.#show(data.index ?? 0, blob);
        if (!this.followed) this.#tell("Drawing");
        if (event.endsWith(".completed")) await this.#picture(data, blob);
      }
    } catch (error) {
      throw error instanceof TypeError ? broken() : error; // what a cut connection is, in a browser
    }
    if (this.left) throw broken();
  }

  #show(index, blob) {
    const frame = this.frames[index];
    const image = make("img", { alt: `Preview ${index + 1} of ${this.name}`, src: URL.createObjectURL(blob) });
    frame.newest = image;
    image.decode().catch(() => {}).then(() => {
      const old = frame.newest === image ? frame.firstChild : image; // a later one may be decoded before
      if (old !== image) frame.replaceChildren(image);
      if (old) URL.revokeObjectURL(old.src);
    });
  }

  async #picture(data, blob) {
    this.left -= 1;
    const facts = await settingsOf(blob).catch(() => ({}));
    const { n, ...wanted } = { ...this.wanted, seed: data.seed, size: data.size };
    const id = `${this.id}-${data.index ?? 0}`;
    await hooks.drawn({ id, made: Date.now(), blob, size: data.size, wanted, facts, ...this.given, edited: Boolean(this.given.image), warnings: data.warnings ?? [] });
  }

  /** An entry of the server's queue; `ahead` is how many wait before it. */
  follow({ state, row, rows, progress, pictures, done }, ahead) {
    if (!this.open) return;
    if (state === "waiting") return this.#tell(ahead ? `Waits; ${count(ahead, "request")} before it` : "Waits; it is next");
    this.followed = true;
    this.progress.value = Math.max(this.progress.value, progress);
    const many = pictures > 1 ? `, ${done} of ${pictures} pictures done` : "";
    this.#tell(`Step ${row} of ${rows}${many}`);
  }

  #tell(text) {
    if (this.state.textContent !== text) this.state.textContent = text;
  }

  async cancel() {
    if (!this.open || this.cancelled) return;
    this.cancelled = true;
    this.#tell("Cancelling");
    if (!this.sent) {
      this.#failed();
      next();
      return;
    }
    // Asked first, so that the server calls it cancelled; hung up on in any case.
    const signal = AbortSignal.timeout(CANCEL_PATIENCE);
    await ask(`latentrt/jobs/${this.id}/cancel`, { method: "POST", signal }).catch(() => {});
    this.abort.abort();
  }

  #done() {
    this.#end();
    const focused = this.card.contains(document.activeElement);
    this.dismiss();
    say(`${this.name}: ${count(this.wanted.n ?? 1, "picture")} done`);
    if (focused) find("history").querySelector("button")?.focus();
  }

  #failed(error) {
    this.#end();
    const focused = this.card.contains(document.activeElement);
    if (this.cancelled) {
      this.#tell("Cancelled");
      say(`${this.name}: cancelled`);
    } else {
      this.state.replaceWith(explained(error));
    }
    this.progress.remove();
    const again = button("Draw again", () => {
      this.dismiss();
      start(this.wanted, this.given).card.querySelector("button").focus();
    });
    this.actions.replaceChildren(again, button("Dismiss", () => (this.dismiss(), toForm())));
    const setting = error?.param && hooks.field(error.param);
    if (setting && !this.cancelled) this.actions.append(button("Go to the setting", () => goTo(setting)));
    if (focused) again.focus();
  }

  #end() {
    this.open = false;
    this.card.classList.add("ended");
  }

  dismiss() {
    for (const image of this.card.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    this.card.remove();
    jobs.delete(this);
    find("jobs-section").hidden = !jobs.size;
  }
}

function goTo(setting) {
  setting.closest("details")?.setAttribute("open", "");
  setting.focus();
}

const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

/** An error in words: what was found, what was needed, what to do. */
function explained(error) {
  const refusal = error instanceof Refusal ? error : new Refusal(`This page failed: ${error?.message ?? error}`);
  const wait = refusal.wait ? `The server expects room in about ${count(refusal.wait, "second")}.` : "";
  const lines = [
    ["What happened", refusal.found],
    ["Needed", refusal.needed],
    ["What to do", refusal.fix],
    ["When", wait],
  ].filter(([, text]) => text);
  const list = make("dl", {}, ...lines.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));
  return make("div", { className: "error", role: "alert" }, list);
}
