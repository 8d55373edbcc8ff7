// What the server is doing, asked for gently: often while something of this page is drawn, never in a hidden tab.

import { ask } from "./api.js";
import { count, find, make, say } from "./dom.js";

const BUSY = 500; // ms between questions
const IDLE = 4000;
const PATIENCE = 10_000;
const MOST_SHOWN = 8;

const STATES = {
  ready: ["Ready", ""],
  starting: ["Starting", "The server starts. It takes requests in a moment."],
  draining: ["Ending", "The server is ending: it finishes what it has and takes nothing new."],
  failed: ["Failed", "The engine failed and checks itself. Requests are refused until it is well; the server’s log says why."],
  offline: ["Offline", "The server does not answer. It is asked again every few seconds."],
  locked: ["Locked", "This server wants a key: give it under Key."],
};

let hooks = {};
let timer = 0;
let asking = false;
let again = false; // somebody wants to know what has changed since

/** `busy()` says whether to hurry, `queue(entries)` and `state(name)` hear what was found, `mine(id)` knows own jobs. */
export function begin(given) {
  hooks = given;
  document.addEventListener("visibilitychange", look);
  addEventListener("online", look);
  return look();
}

/** Ask now, and go on asking. */
export async function look() {
  clearTimeout(timer);
  again = asking;
  if (asking || document.hidden) return;
  asking = true;
  try {
    const response = await ask("latentrt/queue", { signal: AbortSignal.timeout(PATIENCE) });
    const queue = await response.json();
    show(queue);
    hooks.queue(queue.jobs);
    await turn(queue.state);
  } catch (error) {
    find("queue").replaceChildren();
    find("load").textContent = "Not known.";
    await turn(error.code === "invalid_api_key" ? "locked" : "offline");
  }
  asking = false;
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(look, again ? 0 : hooks.busy() ? BUSY : IDLE);
}

async function turn(state) {
  const [word, notice] = STATES[state] ?? [state, ""];
  const line = find("state");
  if (line.dataset.state !== state) {
    line.dataset.state = state;
    line.textContent = word;
    find("notice").textContent = notice;
    find("notice").hidden = !notice;
    say(`Server: ${word}. ${notice}`);
  }
  await hooks.state(state);
}

function show({ waiting, running, capacity, jobs }) {
  const text = waiting || running ? `${running} drawing, ${waiting} waiting; room for ${Math.max(0, capacity - waiting)} more` : `Idle; room for ${count(capacity, "picture")}`;
  if (find("load").textContent !== text) find("load").textContent = text;
  const lines = jobs.slice(0, MOST_SHOWN).map(line);
  if (jobs.length > MOST_SHOWN) lines.push(make("li", { className: "quiet" }, `and ${jobs.length - MOST_SHOWN} more`));
  find("queue").replaceChildren(...lines);
}

function line({ id, state, pictures, row, rows, progress }) {
  const whose = hooks.mine(id) ? "Yours" : "Another’s";
  const how = state === "waiting" ? "waits" : `step ${row} of ${rows}`;
  const bar = make("progress", { max: 1, value: progress, "aria-label": `${whose}: progress` });
  return make("li", { className: hooks.mine(id) ? "mine" : "" }, make("span", {}, `${whose}, ${count(pictures, "picture")}: ${how}`), bar);
}
