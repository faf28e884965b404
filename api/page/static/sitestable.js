// The table of sites: built once, after which only what was chosen changes.

import { byId, h, settled, show, shown } from "./dom.js";

const MARKS = { exact: "=", approx: "≈", refused: "×" };
/** Columns before those of the methods. */
const FIRST = 6;
const SAID = { exact: "exact", approx: "approximate", refused: "refused" };

export function sitesTable(open, choose) {
  const [table, filter, refusedOnly] = [byId("sites"), byId("filter"), byId("only-refused")];
  let rows = [];
  let columns = [];
  let decisions = new Map();

  table.addEventListener("click", (event) => {
    const row = event.target.closest("[data-path]");
    if (!row) return;
    const { path } = row.dataset;
    const cell = event.target.closest(".m");
    const place = cell ? [...row.children].indexOf(cell) : -1;
    if (cell?.matches(".exact, .approx")) choose(path, columns[place - FIRST]);
    else if (cell || event.target.closest("button")) open(path);
  });
  const refilter = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const { row, text, path } of rows) {
      const decision = decisions.get(path);
      const all = `${text} ${decision?.method ?? ""}`;
      const fits = words.every((word) => all.includes(word)) && (!refusedOnly.checked || decision?.effect === "refused");
      if (row.hidden === fits) row.hidden = !fits;
      left += Number(fits);
    }
    byId("filter-count").textContent = left === rows.length ? `${left} sites` : `${left} of ${rows.length} sites`;
  };
  filter.addEventListener("input", settled(80, refilter));
  refusedOnly.addEventListener("change", refilter);

  return {
    /** Build the table; without cells the methods have no columns yet. */
    build(sites, methods, cells) {
      columns = cells.size ? methods : [];
      widths(table, sites, columns.length);
      const head = h("div", { role: "row" },
        ...[["site"], ["gets"], ["channels", "n"], ["map", "n"], ["fed by"], ["then"]].map(([name, kind]) => h("div", { role: "columnheader", class: kind }, name)),
        ...columns.map((name) => h("div", { role: "columnheader", class: "m" }, h("span", {}, shown(name)))));
      rows = sites.map((site) => {
        const [producer, then, found] = [producerOf(site), activationOf(site), cells.get(site.path)];
        const button = h("button", { type: "button", class: "gets" }, "…");
        const row = h("div", { role: "row", "data-path": site.path },
          h("div", { role: "rowheader" }, h("bdi", { class: "path" }, shown(site.path) || "(the model)")),
          h("div", { role: "cell" }, button),
          h("div", { role: "cell", class: "n" }, site.channels ?? "?"),
          h("div", { role: "cell", class: "n" }, mapOf(site)),
          h("div", { role: "cell" }, producer), h("div", { role: "cell" }, then),
          ...columns.map((name) => {
            const effect = effectOf(found?.get(name));
            return h("div", { role: "cell", class: `m ${effect}`, "aria-label": SAID[effect] }, MARKS[effect]);
          }));
        return { row, button, taken: null, path: site.path, text: `${site.path} ${producer} ${then}`.toLowerCase() };
      });
      table.replaceChildren(
        h("div", { role: "rowgroup", class: "head" }, head), h("div", { role: "rowgroup", class: "body" }, ...rows.map((one) => one.row)));
      refilter();
    },
    update(given) {
      decisions = given;
      for (const one of rows) {
        const { row, button, path } = one;
        const { method, effect, by } = decisions.get(path);
        const now = `${method} ${effect} ${by}`;
        if (one.now === now) continue;
        one.now = now;
        button.textContent = shown(method);
        button.className = `gets ${effect}${by === "all" ? "" : " own"}`;
        button.setAttribute("aria-label", `${shown(path)}: ${shown(method)}, ${SAID[effect] ?? "stays"}. Choose another`);
        one.taken?.classList.remove("taken");
        const place = columns.indexOf(method);
        one.taken = place < 0 ? null : row.children[FIRST + place];
        one.taken?.classList.add("taken");
      }
      if (refusedOnly.checked || filter.value) refilter();
    },
    wait(is) {
      table.classList.toggle("waiting", is);
      show(byId("survey-state"), is);
    },
  };
}

/** Set the columns' widths: rows that are not looked at have none of their own. */
function widths(table, sites, methods) {
  const longest = (texts) => Math.max(0, ...texts.map((text) => text.length));
  const set = (name, value, least, most) => table.style.setProperty(name, `${Math.round(Math.min(most, Math.max(least, value)))}px`);
  table.style.setProperty("--methods", methods);
  set("--path", 7.6 * longest(sites.map((site) => site.path)) + 18, 90, 270);
  set("--map", 8 * longest(sites.map(mapOf)) + 16, 50, 110);
  set("--by", 7 * longest(sites.map(producerOf)) + 18, 74, 170);
  set("--then", 7.5 * longest(sites.map(activationOf)) + 18, 56, 110);
}

export function effectOf(cell) {
  if (!cell) return "";
  if (cell.method === null) return "refused";
  return cell.exact ? "exact" : "approx";
}

/** Return the size of the maps that a site normalizes. */
export function mapOf(site) {
  const sizes = site.input_shapes.map((shape) => shape.slice(2).join("×") || "1");
  return [...new Set(sizes)].join(", ") || "?";
}

export function producerOf(site) {
  if (!site.producer) return "?";
  const { layer, groups, transposed } = site.producer;
  const name = layer.split(".").pop();
  if (transposed || !name.startsWith("Conv")) return shown(name);
  return groups > 1 ? (groups === site.channels ? `${shown(name)}, depthwise` : `${shown(name)}, ${groups} groups`) : shown(name);
}

/** Functions under the names of the layers that do the same. */
const ACTIVATIONS = ["ReLU", "ReLU6", "SiLU", "GELU", "Hardswish", "Hardsigmoid", "LeakyReLU", "ELU", "Mish", "Sigmoid", "Tanh"];
const NAMES = new Map(ACTIVATIONS.map((name) => [name.toLowerCase(), name]));

export function activationOf(site) {
  const found = site.followed_by?.layer ?? site.activation;
  if (!found) return "–";
  const name = found.split(".").pop();
  return shown(NAMES.get(name.replaceAll("_", "").toLowerCase()) ?? name);
}
