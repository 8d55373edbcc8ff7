// Pictures beside the prompt, and how they act: each ControlNet follows one, each IP-Adapter shows one.

import { button, find, hand, make, say, tooLarge } from "../dom.js";

const NUMBERS = { scale: ["Scale", 1, 1000], start: ["From", 0, 1], end: ["To", 1, 1] }; // label, usual, most
const SETTINGS = {
  controlnet: ["scale", "start", "end", "guess"],
  t2i_adapter: ["scale", "start", "end"],
  controlnet_union: ["scale", "start", "end", "guess", "type"], // others follow maps of one kind
  ip_adapter: ["scale"],
}; // by kind

let most = Infinity; // bytes

/** `key` is the API's name for them, `kind` what they are unless the server says it, `does` what they do with a picture. */
class Pictures {
  #parts = []; // {name, element, file, fields} of each

  constructor(key, kind, does) {
    Object.assign(this, { key, kind, does, section: find(`${key}s`) });
  }

  /** Show a part for each; what was given to those that were there before remains. */
  offered(model) {
    most = model.limits.max_image_bytes;
    const names = model[`${this.key}s`];
    this.section.hidden = !names.length;
    this.#parts = names.map((name) => this.#parts.find((part) => part.name === name) ?? partOf(name, this));
    this.section.querySelector("div").replaceChildren(...this.#parts.map(({ element }) => element));
    for (const part of this.#parts) part.is(model[`${this.key}_kinds`]?.[part.name] ?? this.kind);
  }

  /** {name: {image, scale, …}} of those with a picture, a Blob. */
  given() {
    const given = this.#parts.filter(({ file }) => file.files[0]);
    return Object.fromEntries(given.map((part) => [part.name, unitOf(part)]));
  }

  /** Write what `given()` once gave into the fields, and take all else out; the names of which no picture is there. */
  fill(units, named = {}) {
    for (const { name, fill } of this.#parts) fill(units[name] ?? {});
    if (Object.keys(this.given()).length) this.section.open = true;
    return Object.keys({ ...named, ...units }).filter((name) => !this.given()[name]);
  }

  /** Let one have this picture. */
  use(name, blob) {
    const part = this.#parts.find((one) => one.name === name);
    this.section.open = true;
    part.give(blob);
    part.fields.scale.focus();
    say(`${name} ${this.does} the picture`);
  }
}

export const controls = new Pictures("control", "controlnet", "follows");
export const shown = new Pictures("ip_adapter", "ip_adapter", "shows");

function partOf(name, { key, does }) {
  const input = (setting, attributes) => make("input", { name: `${key}.${name}.${setting}`, ...attributes }); // as refusals call it
  const field = (text, one) => make("label", { className: "field" }, `${text} `, one);
  const file = input("image", { type: "file", accept: "image/png,image/jpeg,image/webp" });
  const fields = {
    guess: input("guess", { type: "checkbox" }),
    type: input("type", { required: true, placeholder: "canny, or a number" }),
  };
  const numbers = Object.entries(NUMBERS).map(([setting, [text, value, max]]) => {
    fields[setting] = input(setting, { type: "number", min: 0, max, step: "any", value, required: true });
    return field(text, fields[setting]);
  });
  const part = { name, file, fields };
  const image = make("img", { alt: `The picture that ${name} ${does}` });
  const remove = button("Remove", () => {
    part.give(null);
    file.focus();
  }, { "aria-label": `Remove the picture of ${name}` });
  const guess = make("label", { className: "check" }, fields.guess, "Guess mode");
  const settings = make("div", { className: "follows" }, image, make("div", { className: "grid thirds" }, ...numbers), field("Kind of map", fields.type), guess, remove);
  const show = () => {
    const blob = file.files[0];
    URL.revokeObjectURL(image.src);
    if (blob) image.src = URL.createObjectURL(blob);
    settings.hidden = !blob;
    for (const one of Object.values(fields)) one.disabled = !blob || one.closest("label").hidden;
    check(part);
  };
  part.give = (blob) => {
    hand(file, blob);
    show();
  };
  part.fill = ({ image: blob = null, guess: guesses = false, ...unit }) => {
    fields.guess.checked = guesses;
    for (const setting of ["scale", "start", "end", "type"]) fields[setting].value = unit[setting] ?? NUMBERS[setting]?.[1] ?? "";
    part.give(blob);
  };
  part.is = (kind) => {
    for (const [setting, one] of Object.entries(fields)) one.closest("label").hidden = !SETTINGS[kind].includes(setting);
    show();
  };
  file.addEventListener("change", show);
  part.element = make("fieldset", { oninput: () => check(part) }, make("legend", {}, name), field("Picture", file), settings);
  return part;
}

function check({ file, fields: { start, end } }) {
  file.setCustomValidity(tooLarge(file.files[0], most));
  end.setCustomValidity(Number(start.value) > Number(end.value) ? "It ends before it begins" : "");
}

function unitOf({ file, fields }) {
  const valueOf = ({ type, checked, value }) => (type === "checkbox" ? checked : type === "number" || /^\d+$/.test(value) ? Number(value) : value.trim());
  const read = Object.entries(fields).filter(([, one]) => !one.disabled);
  return { image: file.files[0], ...Object.fromEntries(read.map(([setting, one]) => [setting, valueOf(one)])) };
}

/** The same with pictures in base64, as the API reads them. */
export async function encoded(units) {
  const texts = Object.entries(units).map(async ([name, unit]) => [name, { ...unit, image: await base64(unit.image) }]);
  return Object.fromEntries(await Promise.all(texts));
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
