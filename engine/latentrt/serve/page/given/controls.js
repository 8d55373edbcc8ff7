// ControlNets: for each that the server has, a picture that it follows, and how.

import { button, find, make, say } from "../dom.js";

const NUMBERS = { scale: ["Scale", 1, 1000], start: ["From", 0, 1], end: ["To", 1, 1] }; // label, usual, most

let parts = []; // the fields of each: {name, element, file, scale, start, end, guess}
let most = Infinity; // bytes

/** Show a part for each; what was given to those that were there before remains. */
export function offered({ controls, limits, control_kinds: kinds = {} }) {
  most = limits.max_image_bytes;
  find("controls").hidden = !controls.length;
  parts = controls.map((name) => parts.find((part) => part.name === name) ?? partOf(name));
  find("control-list").replaceChildren(...parts.map((part) => part.element));
  for (const part of parts) part.is(kinds[part.name] ?? "controlnet");
  parts.forEach(check);
}

/** Write what a picture was made with into the fields, as `controls()` gives it, and take all else out. */
export function fill(units) {
  for (const part of parts) {
    const { image = null, scale = 1, start = 0, end = 1, guess = false, type = "" } = units[part.name] ?? {};
    for (const [setting, value] of Object.entries({ scale, start, end, type })) part[setting].value = value;
    part.guess.checked = guess;
    part.give(image);
    if (image) find("controls").open = true;
  }
}

/** Let one follow this picture. */
export function follow(name, blob) {
  const part = parts.find((one) => one.name === name);
  find("controls").open = true;
  part.give(blob);
  part.scale.focus();
  say(`${name} follows the picture`);
}

function partOf(name) {
  const input = (setting, attributes) => make("input", { name: `control.${name}.${setting}`, ...attributes }); // as refusals call it
  const field = (text, one) => make("label", { className: "field" }, `${text} `, one);
  const part = { name, file: input("image", { type: "file", accept: "image/png,image/jpeg,image/webp" }) };
  const numbers = Object.entries(NUMBERS).map(([setting, [text, value, max]]) => {
    part[setting] = input(setting, { type: "number", min: 0, max, step: "any", value, required: true });
    return field(text, part[setting]);
  });
  part.guess = input("guess", { type: "checkbox" });
  part.type = input("type", { required: true, placeholder: "canny, or a number" });
  const image = make("img", { alt: `The picture that ${name} follows` });
  const remove = button("Remove", () => {
    part.give(null);
    part.file.focus();
  }, { "aria-label": `Remove the picture of ${name}` });
  const guess = make("label", { className: "check" }, part.guess, "Guess mode");
  const type = field("Kind of map", part.type);
  const settings = make("div", { className: "follows" }, image, make("div", { className: "grid thirds" }, ...numbers), type, guess, remove);
  const show = () => {
    const blob = part.file.files[0];
    URL.revokeObjectURL(image.src);
    if (blob) image.src = URL.createObjectURL(blob);
    settings.hidden = !blob;
    for (const one of settings.querySelectorAll("input")) one.disabled = !blob || one.closest("label").hidden;
    check(part);
  };
  part.give = (blob) => {
    const data = new DataTransfer(); // an input takes files of nothing else
    if (blob) data.items.add(new File([blob], blob.name ?? "picture", { type: blob.type }));
    part.file.files = data.files;
    show();
  };
  part.is = (kind) => {
    guess.hidden = kind === "t2i_adapter"; // it has no such mode
    type.hidden = kind !== "controlnet_union"; // others follow maps of one kind
    part.guess.checked &&= !guess.hidden;
    show();
  };
  part.file.addEventListener("change", show);
  part.element = make("fieldset", { oninput: () => check(part) }, make("legend", {}, name), field("Picture", part.file), settings);
  show();
  return part;
}

function check({ file, start, end }) {
  const mebibytes = (bytes) => `${(bytes / 2 ** 20).toPrecision(3)} MiB`;
  const size = file.files[0]?.size ?? 0;
  file.setCustomValidity(size > most ? `The file has ${mebibytes(size)}; this server takes ${mebibytes(most)}` : "");
  end.setCustomValidity(Number(start.value) > Number(end.value) ? "It ends before it begins" : "");
}

/** {name: {image, scale, start, end, guess, type}} of those with a picture, a Blob; null if there are none. */
export function controls() {
  const given = parts.filter(({ file }) => file.files[0]);
  const units = given.map(({ name, file, scale, start, end, guess, type }) => {
    const [image] = file.files;
    const unit = { image, scale: Number(scale.value), start: Number(start.value), end: Number(end.value), guess: guess.checked };
    const number = /^\d+$/.test(type.value);
    return [name, type.disabled ? unit : { ...unit, type: number ? Number(type.value) : type.value.trim() }];
  });
  return units.length ? Object.fromEntries(units) : null;
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
