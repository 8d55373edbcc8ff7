// Light or dark: as the system says, until somebody wants the other.

import { find } from "./dom.js";

const KEY = "latentrt.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

const dark = () => (localStorage.getItem(KEY) ?? (system.matches ? "dark" : "light")) === "dark";

export function begin() {
  find("theme").addEventListener("click", turn);
  system.addEventListener("change", show);
  show();
}

/** The other one; where that is the system's, it is followed again. */
function turn() {
  const wanted = !dark();
  if (wanted === system.matches) localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, wanted ? "dark" : "light");
  show();
}

function show() {
  document.documentElement.dataset.theme = localStorage.getItem(KEY) ?? "";
  find("theme").textContent = dark() ? "Light" : "Dark";
}
