// The table of sites: built once, after which only what was chosen changes.

import { byId, h, settled, show, shown } from "./dom.js";

const MARKS = { exact: "=", approx: "≈", refused: "×" };
const SAID = { exact: "exact", approx: "approximate", refused: "refused" };

export function sitesTable(open, choose) {
  const [table, filter, refusedOnly] = [byId("sites"), byId("filter"), byId("only-refused")];
  let rows = [];
  let decisions = new Map();

  table.addEventListener("click", (event) => {
    const row = event.target.closest("tbody tr");
    if (!row) return;
    const { path } = row.dataset;
    const cell = event.target.closest("td.m");
    if (cell && cell.dataset.effect !== "refused" && cell.dataset.effect) choose(path, table.tHead.rows[0].cells[cell.cellIndex].dataset.method);
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
    build(sites, methods, cells) {
      const head = h("tr", {},
        h("th", { scope: "col" }, "site"), h("th", { scope: "col" }, "gets"),
        h("th", { scope: "col", class: "n" }, "channels"), h("th", { scope: "col", class: "n" }, "map"),
        h("th", { scope: "col" }, "fed by"), h("th", { scope: "col" }, "then"),
        ...methods.map((name) => h("th", { scope: "col", class: "m", "data-method": name }, h("span", {}, shown(name)))));
      rows = sites.map((site) => {
        const producer = producerOf(site);
        const then = activationOf(site);
        const row = h("tr", { "data-path": site.path },
          h("th", { scope: "row" }, h("bdi", { class: "path" }, shown(site.path) || "(the model)")),
          h("td", {}, h("button", { type: "button", class: "gets" }, "…")),
          h("td", { class: "n" }, site.channels ?? "?"),
          h("td", { class: "n" }, mapOf(site)),
          h("td", {}, producer), h("td", {}, then),
          ...methods.map((name) => {
            const effect = effectOf(cells.get(site.path)?.get(name));
            return h("td", { class: `m ${effect}`, "data-effect": effect, "aria-label": SAID[effect] ?? "not known yet" }, MARKS[effect] ?? "");
          }));
        return { row, path: site.path, text: `${site.path} ${producer} ${then}`.toLowerCase() };
      });
      const body = h("tbody", {}, ...rows.map((one) => one.row));
      table.tHead.replaceChildren(head);
      for (const old of [...table.tBodies]) old.remove();
      table.append(body);
      refilter();
    },
    update(given) {
      decisions = given;
      const heads = [...table.tHead.rows[0].cells].map((cell) => cell.dataset.method);
      for (const { row, path } of rows) {
        const { method, effect, by } = decisions.get(path);
        const button = row.cells[1].firstChild;
        const key = `${method} ${effect} ${by}`;
        if (button.dataset.key === key) continue;
        button.dataset.key = key;
        button.textContent = shown(method);
        button.className = `gets ${effect}${by === "all" ? "" : " own"}`;
        button.setAttribute("aria-label", `${shown(path)}: ${shown(method)}, ${SAID[effect] ?? "stays"}. Choose another`);
        row.querySelector(".taken")?.classList.remove("taken");
        const place = heads.indexOf(method);
        if (place >= 0) row.cells[place].classList.add("taken");
      }
      if (refusedOnly.checked || filter.value) refilter();
    },
    wait(is) {
      table.classList.toggle("waiting", is);
      show(byId("matrix-key"));
    },
  };
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
