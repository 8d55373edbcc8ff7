// What a PNG of latentrt says about itself.

const NAME = "latentrt";

/** The settings that a picture carries, or {} if it carries none. */
export async function settingsOf(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = latin1(bytes.subarray(at + 4, at + 8));
    const text = textOf(kind, bytes.subarray(at + 8, at + 8 + length));
    if (text !== null) return JSON.parse(text);
    if (kind === "IDAT") break; // texts stand before the pixels
    at += 12 + length;
  }
  return {};
}

const latin1 = (bytes) => String.fromCharCode(...bytes);

/** The text of an uncompressed tEXt or iTXt chunk of that name; null for any other chunk. */
function textOf(kind, chunk) {
  if (!["tEXt", "iTXt"].includes(kind) || latin1(chunk.subarray(0, NAME.length + 1)) !== `${NAME}\0`) return null;
  const rest = chunk.subarray(NAME.length + 1);
  if (kind === "tEXt") return latin1(rest);
  const keyword = rest.indexOf(0, 2); // after two flags: language, translated keyword, text
  return rest[0] === 1 ? null : new TextDecoder().decode(rest.subarray(rest.indexOf(0, keyword + 1) + 1));
}
