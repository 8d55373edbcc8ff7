// Small helpers for elements.

export const find = (id) => document.getElementById(id);

/** An element; `on…` attributes are listeners, properties are set, all else becomes an attribute. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export const button = (text, onclick, attributes = {}) => make("button", { type: "button", ...attributes, onclick }, text);

/** What is wrong with a file that is larger than the server takes: while it is sent, the server would hang up. */
export function tooLarge(blob, most) {
  const mebibytes = (bytes) => `${(bytes / 2 ** 20).toPrecision(3)} MiB`;
  return blob?.size > most ? `The file has ${mebibytes(blob.size)}; this server takes ${mebibytes(most)}` : "";
}

/** Put a picture into a field for files, or with null what is there out of it. */
export function hand(input, blob) {
  const data = new DataTransfer(); // it takes files of nothing else
  if (blob) data.items.add(new File([blob], blob.name ?? "picture", { type: blob.type }));
  input.files = data.files;
}

/** Put the cursor into the first field of the form. */
export const toForm = () => [...find("form").elements].find((element) => element.offsetParent && !element.disabled && element.name !== "model")?.focus();

/** Press a button, or let it up again; whether it is pressed now. */
export function toggle(one, pressed = one.ariaPressed !== "true") {
  one.ariaPressed = String(pressed);
  return pressed;
}

/** Put all but an element, those around it and what is told aloud out of reach, or back into it. */
export function alone(element, on) {
  for (let one = element; one !== document.body; one = one.parentElement) {
    for (const other of one.parentElement.children) other.inert = on && other !== one && other.id !== "say" && other.localName !== "dialog";
  }
}

/** Tell those who listen to the page instead of looking at it. */
export function say(text) {
  find("say").textContent = text;
}

/** "1 picture", "2 pictures". */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** What a picture is called: its prompt, or its class, or neither where the model reads neither. */
export const titleOf = ({ prompt, class_label }) => prompt ?? (class_label === undefined ? "Picture" : `Class ${class_label}`);

/** Text without its middle, so that a long prompt remains a name. */
export const short = (text, most = 80) => (text.length > most ? `${text.slice(0, most - 1).trimEnd()}…` : text);
