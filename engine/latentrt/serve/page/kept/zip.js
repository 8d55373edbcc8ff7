// ZIP archives of files that are stored as they are: pictures do not shrink further. By PKWARE's APPNOTE, section 4.3.

const UTF8 = 0x0800; // names are
const VERSION = 20;

/** One Blob of [{name, made, blob}], below 4 GiB in all; `made` in ms. Names must differ. */
export async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, made, blob } of files) {
    const path = new TextEncoder().encode(name);
    const sum = crc(new Uint8Array(await blob.arrayBuffer()));
    const [date, time] = stamp(new Date(made));
    const shared = [[2, UTF8], [2, 0], [2, time], [2, date], [4, sum], [4, blob.size], [4, blob.size], [2, path.length], [2, 0]];
    const local = record([[4, 0x04034b50], [2, VERSION], ...shared]);
    directory.push(record([[4, 0x02014b50], [2, VERSION], [2, VERSION], ...shared, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]]), path);
    parts.push(local, path, blob);
    offset += local.length + path.length + blob.size;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = record([[4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, size], [4, offset], [2, 0]]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

/** Bytes of [[bytes, number], ...], least byte first. */
function record(fields) {
  return Uint8Array.from(fields.flatMap(([size, number]) => Array.from({ length: size }, (_, place) => (number >>> (8 * place)) & 255)));
}

/** Date and time as MS-DOS packs them. */
function stamp(when) {
  const date = ((when.getFullYear() - 1980) << 9) | ((when.getMonth() + 1) << 5) | when.getDate();
  return [date, (when.getHours() << 11) | (when.getMinutes() << 5) | (when.getSeconds() >> 1)];
}

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}
