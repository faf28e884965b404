// Elements: whatever is shown is a text node or an attribute, never markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** Return an element; a property given as a function listens, null and false are left out. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function show(element, visible = true) {
  element.hidden = !visible;
}

/** Say something to those who do not see the page change. */
export function announce(text) {
  byId("announced").textContent = text;
}

/** Show what went wrong with its way out, or nothing. */
export function tell(element, error) {
  element.replaceChildren();
  show(element, Boolean(error));
  if (!error) return;
  const problem = error.problem;
  const detail = shown(problem?.detail ?? error.message);
  if (element.tagName === "P") {
    element.append(detail);
    return;
  }
  element.append(h("p", {}, h("strong", {}, problem?.title ?? "That did not work")));
  const refusals = problem?.refusals ?? [];
  if (refusals.length) element.append(refusalList(refusals));
  else element.append(h("p", {}, detail));
  if (problem?.request_id) {
    element.append(h("p", { class: "help" }, `Request ${problem.request_id}`));
  }
}

const MOST_REFUSALS = 8;

function refusalList(refusals) {
  const items = refusals.slice(0, MOST_REFUSALS).map((one) =>
    h("li", {},
      h("code", {}, h("bdi", {}, shown(one.site) || "(the model itself)")), ": ", h("b", {}, shown(one.method)), " is refused: ",
      shown(one.reason), h("br"), h("span", { class: "muted" }, shown(one.fix))));
  const left = refusals.length - items.length;
  if (left > 0) items.push(h("li", {}, `and ${left} more`));
  return h("ul", { class: "notes" }, ...items);
}

const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** Return a name with what would hide or reorder parts of it spelled out. */
export function shown(text) {
  return String(text ?? "").replace(HIDDEN, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** Ask no more than once in a while: call a function when nothing new came for some milliseconds. */
export function settled(milliseconds, work) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), milliseconds);
  };
}

export function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  let value = count;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (seconds < 1) return "under a second";
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export function when(text) {
  const date = new Date(text);
  const today = date.toDateString() === new Date().toDateString();
  const options = today ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" };
  return h("time", { datetime: text }, new Intl.DateTimeFormat("en-GB", options).format(date));
}

export const count = (number) => new Intl.NumberFormat("en").format(number);

export function percent(value) {
  if (value === null || value === undefined) return "not finite";
  if (value === 0) return "0 %";
  const scaled = 100 * value;
  if (scaled < 0.01) return `${scaled.toExponential(0).replace("-0", "-")} %`;
  return `${scaled < 1 ? scaled.toPrecision(1) : scaled.toFixed(1)} %`;
}

/** Make tabs of the buttons in a list: arrows move between them. */
export function tabs(list, onSelect) {
  const all = () => [...list.querySelectorAll("[role=tab]")];
  const select = (tab, focus) => {
    for (const one of all()) {
      const selected = one === tab;
      one.setAttribute("aria-selected", String(selected));
      one.tabIndex = selected ? 0 : -1;
    }
    const panel = byId(tab.getAttribute("aria-controls"));
    panel.setAttribute("aria-labelledby", tab.id);
    if (focus) tab.focus();
    onSelect(tab.dataset.kind);
  };
  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) select(tab, false);
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const found = all().filter((tab) => !tab.hidden);
    const place = found.findIndex((tab) => tab.getAttribute("aria-selected") === "true");
    select(found[(place + step + found.length) % found.length], true);
    event.preventDefault();
  });
  return (kind) => {
    const tab = all().find((one) => one.dataset.kind === kind);
    if (tab) select(tab, false);
  };
}

/** Make a button copy what a function returns, and say so. */
export function copying(button, text) {
  const label = button.textContent;
  button.addEventListener("click", async () => {
    const done = await copy(text());
    button.textContent = done ? "Copied" : "Select it and press Ctrl+C";
    announce(done ? "Copied" : "The browser does not let this page copy");
    setTimeout(() => (button.textContent = label), 2000);
  });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without HTTPS there is no clipboard but this one.
    const area = h("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
