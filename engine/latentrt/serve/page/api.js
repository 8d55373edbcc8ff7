// The server's API: requests, its errors in words, its event streams, and the key.

const KEY = "latentrt.key";

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

/** What went wrong: found, needed, fix, as the server's own errors say it; and the code, field and wait, if any. */
export class Refusal extends Error {
  constructor(found, { needed = "", fix = "", code = "", param = null, wait = 0 } = {}) {
    super(found);
    Object.assign(this, { found, needed, fix, code, param, wait });
  }

  /** From OpenAI's shape. Messages of this server have three parts. */
  static of({ message = "", code = "", param = null } = {}, wait = 0) {
    const parts = /^(.*?)\. Needed: (.*?)(?:\. To fix it: (.*))?$/s.exec(message);
    const [found, needed, fix = ""] = parts ? parts.slice(1) : [message || "The server refused.", ""];
    return new Refusal(found, { needed, fix: FIX[code] ?? fix, code, param, wait });
  }
}

// Where this page knows better than the server what to do next.
const FIX = {
  invalid_api_key: "give this server’s key under Key",
  engine_error: "try again; the server’s log has the details",
};

const unreachable = () =>
  new Refusal("The server does not answer", {
    needed: "a running server and a connection to it",
    fix: "check both, then try again",
    code: "offline",
  });

export const broken = () =>
  new Refusal("The connection broke before all pictures had come", {
    fix: "try again; the same seed gives the same pictures",
    code: "offline",
  });

/** A response that is good; paths are relative, so that the page works below any prefix. */
export async function ask(path, { headers = {}, ...options } = {}) {
  const secret = key() ? { authorization: `Bearer ${key()}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...secret }, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (!response.ok) throw await refusalOf(response);
  return response;
}

async function refusalOf(response) {
  const wait = Number(response.headers.get("retry-after")) || 0;
  const body = await response.json().catch(() => null); // a proxy may have answered
  return Refusal.of(body?.error ?? { message: `The server answered ${response.status}` }, wait);
}

/** {event, data} of a stream of server-sent events; data is parsed JSON. */
export async function* events(stream) {
  let event = "";
  let data = [];
  for await (const line of lines(stream)) {
    if (line === "") {
      if (data.length) yield { event, data: JSON.parse(data.join("\n")) };
      [event, data] = ["", []];
    } else {
      const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line); // a comment has no field
      if (field === "event") event = value;
      if (field === "data") data.push(value);
    }
  }
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r\n|\n|\r(?!$)/); // a last \r may be half of a \r\n
    rest = parts.pop();
    yield* parts;
  }
}
