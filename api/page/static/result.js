// What a job came to: numbers, tables, files, the code that loads them, the report, and what may be done next.

import { file, get, key, text } from "./api.js";
import { byId, bytes, copying, count, h, percent, show, shown, tell } from "./dom.js";
import { nextPart } from "./next.js";
import { python } from "./plantext.js";

const ROLES = {
  weights: "the network's weights", script: "rebuilds the network, without normsearch", layers: "layers that torch does not have",
  plan: "which method stands where", report: "the report's numbers", page: "the report, to read", sensitivity: "the measured drifts",
};

const RUNGS = { affine: "distilling into the new layers", all: "distilling into all parameters" };

export function resultPart() {
  const next = nextPart();
  let frame = null;
  // As tall as what it shows, so that there is one thing to scroll; its links to its own parts need this origin.
  const heights = new ResizeObserver(([entry]) => {
    byId("report").style.height = `${Math.ceil(entry.target.scrollHeight) + 2}px`;
  });
  byId("report").addEventListener("load", () => {
    heights.disconnect();
    const shownReport = byId("report").contentDocument?.body;
    if (frame && shownReport) heights.observe(shownReport);
  });
  copying(byId("copy-code"), () => byId("load-code").textContent);
  byId("files").addEventListener("click", (event) => {
    const link = event.target.closest("a[data-fetch]");
    if (!link) return;
    event.preventDefault();
    download(link);
  });

  function clear() {
    show(byId("job-result"), false);
    for (const part of ["files-part", "code-part", "next-part", "report-part"]) show(byId(part), false);
    for (const part of ["job-cards", "job-notes", "job-tables", "files"]) byId(part).replaceChildren();
    byId("download-status").textContent = "";
    byId("report").removeAttribute("src");
    byId("report").style.removeProperty("height");
    if (frame) URL.revokeObjectURL(frame);
    frame = null;
  }

  return {
    clear,
    async draw(job, signal) {
      clear();
      const { result } = job;
      show(byId("job-result"));
      byId("job-notes").replaceChildren(...(result.notes ?? []).map((note) => h("li", {}, shown(note))));
      byId("job-cards").replaceChildren(...cards(job));
      byId("job-tables").replaceChildren(...tables(job));
      const artifacts = await artifactsOf(result.artifacts, signal);
      if (signal.aborted) return;
      show(byId("files-part"), artifacts.length > 0);
      byId("files").replaceChildren(...artifacts.map(fileRow));
      loading(artifacts);
      next.draw(job, artifacts, signal);
      await measured(artifacts.find((one) => one.role === "report"), signal);
      if (signal.aborted) return;
      const report = artifacts.find((one) => one.role === "page");
      if (!report) return;
      const html = await text(`/v1/artifacts/${report.id}`);
      if (signal.aborted) return;
      // What a report says is nobody's promise: nothing in the frame may run, be sent, or open a window.
      frame = URL.createObjectURL(new Blob([html], { type: "text/html; charset=utf-8" }));
      byId("report").src = frame;
      show(byId("report-part"));
    },
  };
}

/** Return what was made; ids sort by time, so that they lie beside each other in the list. */
async function artifactsOf(ids, signal) {
  if (!ids?.length) return [];
  const wanted = new Map(ids.map((id, place) => [id, place]));
  const found = [];
  let cursor = following(ids.toSorted().at(-1));
  do {
    const page = await get(`/v1/artifacts?${new URLSearchParams({ limit: 50, cursor })}`, { signal });
    found.push(...page.items.filter((one) => wanted.has(one.id)));
    cursor = page.next;
    if (page.items.length && page.items.at(-1).id < ids.toSorted()[0]) break;
  } while (cursor && found.length < ids.length);
  return found.sort((a, b) => wanted.get(a.id) - wanted.get(b.id));
}

/** Return the id after one: a list begins below its cursor. */
function following(id) {
  const [kind, number] = id.split("_");
  return `${kind}_${(BigInt(`0x${number}`) + 1n).toString(16).padStart(number.length, "0")}`;
}

function card(label, value, detail) {
  return h("div", { class: "card" }, h("div", { class: "small" }, label), h("div", { class: "big" }, value), detail ? h("div", { class: "small" }, detail) : null);
}

/** Show what a report's numbers say, if they are what a report has: a child wrote them. */
async function measured(report, signal) {
  if (!report) return;
  const said = await text(`/v1/artifacts/${report.id}`);
  if (signal.aborted) return;
  try {
    byId("job-cards").prepend(...measuredCards(JSON.parse(said).sections));
  } catch {
    byId("job-notes").append(h("li", {}, "The report's numbers cannot be read."));
  }
}

/** What the report measured, before and after. */
function measuredCards(sections) {
  const part = (kind) => sections.find((one) => one.kind === kind);
  const [metric, summary] = [part("metric"), part("summary")];
  const made = [];
  if (metric && metric.original !== null) {
    const after = metric.calibrated ?? metric.converted;
    const between = metric.calibrated === null ? "" : `, ${percent(metric.converted)} converted`;
    made.push(card(shown(metric.name.charAt(0).toUpperCase() + metric.name.slice(1)), percent(after), `${percent(metric.original)} before${between}`));
  }
  const moved = summary?.calibrated ?? summary?.converted;
  if (moved && moved.relative_l2 !== null) {
    made.push(card("Output drift", percent(moved.relative_l2), moved.top1_agreement === null ? "relative L2 distance" : `the same top class for ${percent(moved.top1_agreement)}`));
  }
  return made;
}

function cards({ kind, result }) {
  if (kind === "conversion" || kind === "convert") {
    return [
      card("Layers replaced", count(result.changed)),
      card("Eval function", result.exact ? "kept exactly" : "approximate", result.exact ? "" : "calibration brings it closer"),
      card("Batch independent", result.batch_independent ? "yes" : "in eval only", result.batch_independent ? "in training too" : "training uses statistics of the batch"),
    ];
  }
  if (kind === "calibration") {
    const steps = result.rungs.filter((rung) => rung.kept).length;
    return [
      card("Held-out error before", percent(result.before), "relative L2 of the outputs"),
      card("Held-out error after", percent(result.after), result.before ? `${(result.before / result.after).toFixed(1)} times closer` : ""),
      card("Steps that helped", `${steps} of ${result.rungs.length}`, "one that does not is undone"),
    ];
  }
  if (kind === "sensitivity") {
    const vetoes = Object.values(result.vetoes).reduce((sum, methods) => sum + methods.length, 0);
    return [
      card("Sites", count(result.sites)), card("Methods", count(result.methods.length)),
      card("Vetoes", count(vetoes), "a method that moves the output too far at a site"),
    ];
  }
  return searchCards(result);
}

/** The best plan of a search, and whether it is better than the same method everywhere. */
function searchCards(result) {
  const best = result.confirmation[result.chosen];
  const methods = Object.entries(result.methods).sort((a, b) => b[1] - a[1]).map(([method, many]) => `${shown(method)} × ${many}`);
  const gain = best?.gain ?? null;
  return [
    card("Returned", best?.uniform ? `${shown(best.uniform)} everywhere` : "a mix", methods.join(", ")),
    best ? card("Score", percent(mean(best.scores.length ? best.scores : [best.searched])), best.scores.length ? "accuracy on held-out data, mean over seeds" : "accuracy in the search, not confirmed") : null,
    gain === null ? null : card("Over the best uniform plan", signed(gain), best.error === null ? "" : `± ${percent(best.error)} standard error`),
    card("Plans tried", count(result.trials)),
  ].filter(Boolean);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const signed = (value) => `${value < 0 ? "−" : "+"}${percent(Math.abs(value))}`;

function tables({ kind, result }) {
  if (kind === "search") return result.confirmation.length ? [confirmed(result)] : [];
  if (kind !== "calibration") return [];
  const row = (rung) => h("tr", {}, h("th", { scope: "row" }, shown(RUNGS[rung.name] ?? rung.name)), h("td", { class: "n" }, percent(rung.error)),
    h("td", {}, rung.kept ? "kept" : "undone"), h("td", { class: "n" }, count(rung.steps)), h("td", { class: "n" }, rung.seconds.toFixed(1)));
  return [framed("Steps of the calibration", ["step", "held-out error*", "outcome", "optimisation steps*", "seconds*"], result.rungs.map(row))];
}

/** A table with a name in a frame that scrolls; columns that end with * hold numbers. */
function framed(name, columns, rows) {
  const heads = columns.map((text) => h("th", { scope: "col", class: text.endsWith("*") ? "n" : null }, text.replace("*", "")));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name },
    h("table", {}, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...rows)));
}

function confirmed(result) {
  const rows = result.confirmation.map((plan, place) => h("tr", { class: place === result.chosen ? "taken-row" : null },
    h("th", { scope: "row" }, plan.uniform ? `${shown(plan.uniform)} everywhere` : `mix of trial ${plan.trial}`, place === result.chosen ? h("small", {}, "returned") : null),
    h("td", { class: "n" }, percent(plan.searched)),
    h("td", { class: "n" }, plan.scores.length ? percent(mean(plan.scores)) : "–"),
    h("td", { class: "n" }, plan.gain === null ? "–" : signed(plan.gain)),
    h("td", {}, plan.beats ? "beyond noise" : "")));
  return framed("Plans that were run again", ["plan", "in the search*", "on held-out data*", "over the best uniform*", ""], rows);
}

/** Return what a file is; a program and an ONNX file hold more than weights. */
const roleOf = ({ role, filename }) => (role === "weights" && /\.(pt2|onnx)$/.test(filename) ? "the rewritten network" : ROLES[role] ?? role);

function fileRow(one) {
  const path = `/v1/artifacts/${one.id}`;
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: path, download: one.filename, "data-fetch": Boolean(key()) }, h("bdi", {}, shown(one.filename)))),
    h("td", {}, roleOf(one)),
    h("td", { class: "n" }, bytes(one.bytes)),
    h("td", {}, h("code", { class: "digest" }, one.sha256)));
}

/** A link cannot send a key: the file is fetched, and then saved. */
async function download(link) {
  const status = byId("download-status");
  status.textContent = `Fetching ${link.download}…`;
  try {
    const address = URL.createObjectURL(await file(link.getAttribute("href")));
    h("a", { href: address, download: link.download }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
    status.textContent = "";
  } catch (error) {
    if (error.status !== 401) tell(status, error);
  }
}

function loading(artifacts) {
  const weights = artifacts.find((one) => one.role === "weights");
  const script = artifacts.find((one) => one.role === "script");
  show(byId("code-part"), Boolean(weights));
  if (!weights) return;
  byId("load-code").textContent = loader(weights, script).join("\n");
}

/** Return the lines of Python that load what was made. */
function loader(weights, script) {
  const name = python(weights.filename);
  if (weights.filename.endsWith(".pt2")) return ["import torch", "", `model = torch.export.load(${name}).module()`];
  if (weights.filename.endsWith(".onnx")) return ["import onnxruntime", "", `session = onnxruntime.InferenceSession(${name})`];
  return script
    ? ["# the files beside each other; normsearch is not needed", `from ${script.filename.replace(/\.py$/, "")} import load`, "", "model = load()"]
    : ["import normsearch", "", `model = normsearch.load(${name}).model`];
}

