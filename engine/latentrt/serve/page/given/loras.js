// LoRAs: a strength for each that the server has; without one it is not used.

import { find, make } from "../dom.js";

const PREFIX = "lora."; // of the fields' names

const fields = () => [...find("lora-list").querySelectorAll("input")];

/** Show a field for each; strengths that were given before are kept. */
export function offered({ loras }) {
  const given = strengths();
  find("loras").hidden = !loras.length;
  find("lora-list").replaceChildren(...loras.map((name) => make("label", {}, name, make("input", { type: "number", name: PREFIX + name, step: "any", placeholder: "not" }))));
  fill(given);
}

/** {name: strength} of those that are used. */
export function strengths() {
  const used = fields().filter(({ value }) => value !== "");
  return Object.fromEntries(used.map(({ name, value }) => [name.slice(PREFIX.length), Number(value)]));
}

export function fill(given) {
  for (const field of fields()) field.value = given[field.name.slice(PREFIX.length)] ?? "";
}
