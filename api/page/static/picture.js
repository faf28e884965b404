// The network as a picture: its sites from left to right in the order of the data.

import { h, shown, svg } from "./dom.js";
import { activationOf, mapOf, producerOf } from "./sitestable.js";

const TOP = 26;
const BARS = 130;
const LEFT = 74;
const ROW = 26;
const MARGIN = 46;
const EFFECTS = { kept: "stays BatchNorm", exact: "exact", approx: "approximate", refused: "refused", unknown: "not known yet" };
const SHADES = 5;

/** The picture of a model's sites in a frame; `open` is called with the path of a site that is clicked. */
export function sitePicture(frame, legend, open) {
  let [drawn, groups, kinds, wide] = [null, new Map(), [], 0];
  frame.addEventListener("click", (event) => {
    const found = event.target.closest("[data-path]");
    if (found) open(found.dataset.path);
  });

  function build(sites) {
    const step = Math.max(9, Math.min(100, Math.floor(wide / Math.max(sites.length, 1))));
    const width = LEFT + step * sites.length + 8;
    const height = TOP + BARS + 8 + 3 * ROW + 4;
    const scale = bar(sites);
    kinds = activations(sites);
    groups = new Map(sites.map((site, number) => [site.path, column(site, LEFT + number * step, step, scale, kinds)]));
    const rows = [["channels", 14], ["map", TOP + BARS + 25], ["fed by", TOP + BARS + ROW + 25], ["then", TOP + BARS + 2 * ROW + 25]];
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" },
      ...bands(sites, step, height), ...grid(scale, width), ...groups.values(),
      ...rows.map(([name, y]) => svg("text", { x: 0, y, class: "tick" }, name)));
    const scrolled = frame.scrollLeft;
    frame.replaceChildren(picture);
    frame.scrollLeft = scrolled;
  }

  return (sites, decisions) => {
    // A view that is not shown yet has no width of its own.
    const room = (frame.clientWidth || frame.closest("main").clientWidth - 2 * MARGIN) - LEFT - 8;
    if (drawn !== sites || room !== wide) {
      [drawn, wide] = [sites, room];
      build(sites);
    }
    for (const site of sites) repaint(groups.get(site.path), site, decisions.get(site.path));
    frame.firstChild.setAttribute("aria-label", told(sites, decisions));
    legend.replaceChildren(...keys(decisions, kinds, sites));
  };
}

function repaint(group, site, { method, effect, by }) {
  const kind = `site ${effect}${by === "all" ? "" : " own"}`;
  if (group.getAttribute("class") !== kind) group.setAttribute("class", kind);
  const last = `${shown(method)}: ${EFFECTS[effect]}`;
  if (group.dataset.last === last) return;
  group.dataset.last = last;
  const facts = `${site.channels ?? "?"} channels, map ${mapOf(site)}\nfed by ${producerOf(site)}, then ${activationOf(site)}`;
  group.firstChild.textContent = `${shown(site.path)}\n${facts}\n${last}`;
}

function told(sites, decisions) {
  const tally = new Map();
  for (const one of decisions.values()) tally.set(one.effect, (tally.get(one.effect) ?? 0) + 1);
  const parts = [...tally].map(([effect, many]) => `${many} ${EFFECTS[effect]}`);
  return `${sites.length} sites in the order of the data: ${parts.join(", ")}. The table below has the same.`;
}

/** Return a function from channels to the height of a bar, on a logarithmic scale. */
function bar(sites) {
  const known = sites.map((site) => site.channels ?? 1);
  const low = Math.floor(Math.log2(Math.max(1, Math.min(...known)))) - 1;
  const high = Math.max(low + 2, Math.ceil(Math.log2(Math.max(...known))));
  const height = (channels) => Math.max(3, ((Math.log2(Math.max(1, channels ?? 1)) - low) / (high - low)) * BARS);
  return { height, low, high };
}

function grid({ height, low, high }, width) {
  const every = Math.max(1, Math.ceil((high - low) / 4));
  const lines = [];
  for (let power = high; power > low; power -= every) {
    const y = TOP + BARS - height(2 ** power);
    lines.push(svg("line", { x1: LEFT, x2: width, y1: y, y2: y, class: "grid" }),
      svg("text", { x: LEFT - 6, y: y + 4, class: "tick end" }, String(2 ** power)));
  }
  return lines;
}

/** Return a band and a name for each run of sites below the same part of the network. */
function bands(sites, step, height) {
  const depth = sites.some((site) => partOf(site, 1) !== partOf(sites[0], 1)) ? 1 : 2;
  const made = [];
  let [start, number] = [0, 0];
  for (let place = 1; place <= sites.length; place += 1) {
    if (place < sites.length && partOf(sites[place], depth) === partOf(sites[start], depth)) continue;
    const [x, wide] = [LEFT + start * step, (place - start) * step];
    if (number % 2) made.push(svg("rect", { x, y: 0, width: wide, height, class: "band" }));
    const name = shown(partOf(sites[start], depth));
    const room = Math.floor(wide / 7);
    if (room >= 2) made.push(svg("text", { x: x + 3, y: 14, class: "tick" }, name.length > room ? `${name.slice(0, room - 1)}…` : name));
    start = place;
    number += 1;
  }
  return made;
}

const partOf = (site, depth) => site.path.split(".").slice(0, depth).join(".");

function column(site, x, step, scale, kinds) {
  const thick = Math.max(5, Math.min(36, step - 4));
  const [left, middle] = [x + (step - thick) / 2, x + step / 2];
  const high = scale.height(site.channels);
  const half = Math.min(5, thick / 2 - 1);
  const y = TOP + BARS - high / 2;
  return svg("g", { "data-path": site.path },
    svg("title"),
    svg("rect", { x, y: TOP - 4, width: step, height: BARS + 12 + 3 * ROW, class: "hit" }),
    svg("rect", { x: left, y: TOP + BARS - high, width: thick, height: high, rx: 2, class: "column" }),
    svg("path", { d: `M${middle - half} ${y - half}l${2 * half} ${2 * half}m0 ${-2 * half}l${-2 * half} ${2 * half}`, class: "cross" }),
    ...mapMark(site, middle, thick), producerMark(site, middle), activationMark(site, middle, kinds));
}

/** A square as large as the map, on a logarithmic scale: 1×1 is a dot. */
function mapMark(site, middle, thick) {
  const shape = site.input_shapes[0]?.slice(2);
  const y = TOP + BARS + 8 + ROW / 2;
  if (!shape) return [svg("text", { x: middle, y: y + 4, class: "tick middle" }, "·")];
  const elements = shape.reduce((product, size) => product * size, 1);
  const side = Math.max(3, Math.min(thick, 22, 3 + 1.25 * Math.log2(elements)));
  return [svg("rect", { x: middle - side / 2, y: y - side / 2, width: side, height: side, class: "map" })];
}

function producerMark(site, middle) {
  const y = TOP + BARS + 8 + ROW + ROW / 2;
  const found = site.producer;
  if (!found) return svg("text", { x: middle, y: y + 4, class: "tick middle" }, "·");
  if (found.layer.endsWith("Linear")) return svg("circle", { cx: middle, cy: y, r: 4, class: "conv" });
  return svg("rect", { x: middle - 4, y: y - 4, width: 8, height: 8, class: found.groups > 1 ? "conv grouped" : "conv" });
}

function activationMark(site, middle, kinds) {
  const y = TOP + BARS + 8 + 2 * ROW + ROW / 2;
  const place = kinds.indexOf(activationOf(site));
  if (activationOf(site) === "–") return svg("line", { x1: middle - 3, x2: middle + 3, y1: y, y2: y, class: "none" });
  return svg("path", { d: `M${middle - 4} ${y + 3}h4l4 -7`, class: `act a${place % SHADES}` });
}

function activations(sites) {
  const counts = new Map();
  for (const site of sites) counts.set(activationOf(site), (counts.get(activationOf(site)) ?? 0) + 1);
  counts.delete("–");
  return [...counts].sort((a, b) => b[1] - a[1]).map(([name]) => name);
}

function keys(decisions, kinds, sites) {
  const effects = new Set([...decisions.values()].map((one) => one.effect));
  const mark = (...parts) => svg("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, ...parts);
  const item = (picture, text) => h("span", { class: "key" }, picture, text);
  const made = Object.keys(EFFECTS).filter((effect) => effects.has(effect)).map((effect) =>
    item(mark(svg("g", { class: `site ${effect}` }, svg("rect", { x: 1, y: 1, width: 12, height: 12, rx: 2, class: "column" }))), EFFECTS[effect]));
  const producers = sites.map((site) => site.producer).filter(Boolean);
  if (producers.some((one) => one.groups > 1)) made.push(item(mark(svg("rect", { x: 3, y: 3, width: 8, height: 8, class: "conv grouped" })), "grouped"));
  if (producers.some((one) => one.layer.endsWith("Linear"))) made.push(item(mark(svg("circle", { cx: 7, cy: 7, r: 4, class: "conv" })), "linear"));
  kinds.slice(0, SHADES).forEach((name, number) => made.push(item(mark(svg("path", { d: "M3 10h4l4 -7", class: `act a${number}` })), name)));
  return made;
}
