// A model: its inputs, what may stand at its sites, the choice, and the plan that follows from it.

import { all, get, post } from "./api.js";
import { decided, empty, groups, matches, spellings, to, KEEP } from "./choice.js";
import { byId, count, h, settled, show, shown, tell } from "./dom.js";
import { kind } from "./formats.js";
import { inputsPart } from "./inputs.js";
import { watchJobs } from "./joblist.js";
import { methodField } from "./methodfield.js";
import { sitePicture } from "./picture.js";
import { planText } from "./plantext.js";
import { runPart } from "./run.js";
import { remember, remembered } from "./session.js";
import { siteDialog } from "./sitedialog.js";
import { sitesTable } from "./sitestable.js";

/** What is known of the model that is shown. */
const now = {
  model: null, sites: [], ordered: [], methods: [], columns: [], cells: new Map(), choice: empty(), plan: null, signal: null,
};
let decisions = new Map();
let asked = 0;

export function modelView() {
  const dialog = siteDialog((path, method) => chosen({ sites: { ...now.choice.sites, [path]: method } }), (path) => {
    const { [path]: _, ...sites } = now.choice.sites;
    chosen({ sites });
  });
  const open = (path) => dialog(site(path), cellsOf(path), now.columns, now.choice, now.methods);
  const table = sitesTable(open, (path, method) => chosen({ sites: { ...now.choice.sites, [path]: method } }));
  const picture = sitePicture(byId("picture"), byId("picture-legend"), open);
  const text = planText();
  const fieldOfAll = methodField(byId("all"), byId("all-own"), (method) => chosen({ all: method }));
  const fieldOfRule = methodField(byId("rule-method"), byId("rule-method-own"), () => {});
  const inputs = inputsPart(() => survey());
  const run = runPart(() => ({ ...now, ...inputs.asked(), data: inputs.data(), decided: [...decisions.values()].map((one) => one.method) }));
  const dryRun = settled(500, tryPlan);

  function chosen(changes) {
    now.choice = { ...now.choice, ...changes };
    remember(now.model.id, { choice: now.choice });
    const unknown = spellings(now.choice).filter((method) => !now.columns.includes(method));
    if (unknown.length) survey();
    draw();
  }

  function draw() {
    decisions = new Map(now.sites.map((one) => [one.path, decided(now.choice, one, cellsOf(one.path))]));
    fieldOfAll.set(now.choice.all);
    drawRules();
    table.update(decisions);
    picture(now.ordered, decisions);
    summarize();
    text.draw(now.model, to(now.choice), { ...inputs.asked(), shape: inputs.shape() });
    run.draw();
    dryRun();
  }

  function drawRules() {
    const { rules, sites } = now.choice;
    const lines = rules.map(({ pattern, method }, number) => {
      const many = now.sites.filter((one) => [one.path, ...one.aliases].some((path) => matches(pattern, path))).length;
      const without = () => chosen({ rules: rules.filter((_, other) => other !== number) });
      return ruleLine([h("code", {}, shown(pattern)), " get ", h("b", {}, shown(method)), h("small", {}, `${many} ${many === 1 ? "site" : "sites"}`)], `Remove ${pattern}`, without);
    });
    const single = Object.keys(sites).length;
    if (single) {
      lines.unshift(ruleLine([`${single} ${single === 1 ? "site was" : "sites were"} chosen one by one`], "Forget the choices of single sites", () => chosen({ sites: {} })));
    }
    byId("rules").replaceChildren(...lines);
    show(byId("rules"), lines.length > 0);
  }

  byId("rule-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const pattern = byId("pattern").value.trim();
    const method = fieldOfRule.get();
    const fits = now.sites.some((one) => [one.path, ...one.aliases].some((path) => matches(pattern, path)));
    let error = null;
    if (!pattern) error = new Error("Give a pattern of site paths, for example " + (groups(now.sites)[0] ?? "*") + ".");
    else if (!fits) error = new Error(`No site matches ${shown(pattern)}; paths look like ${shown(now.sites[0]?.path)}.`);
    else if (!method) error = new Error("Choose a method for these sites.");
    tell(byId("choose-error"), error);
    if (error) return (method ? byId("pattern") : byId("rule-method")).focus();
    byId("pattern").value = "";
    chosen({ rules: [...now.choice.rules.filter((rule) => rule.pattern !== pattern), { pattern, method }] });
  });

  /** Ask the service what each method would mean at each site. */
  async function survey() {
    const mine = (asked += 1);
    const { signal } = now;
    byId("sites-scroll").setAttribute("aria-busy", "true");
    table.wait(true);
    try {
      const { input_shape, dataset } = inputs.asked();
      const extra = spellings(now.choice).filter((method) => !now.methods.some((known) => known.name === method));
      const methods = [...now.methods.map((one) => one.name).filter((name) => name !== KEEP), ...extra];
      const found = await post("/v1/plans/choices", { model: now.model.id, methods, input_shape, dataset }, { signal });
      if (mine !== asked || signal.aborted) return;
      inputs.fail(null);
      now.sites = found.sites;
      now.ordered = inOrder(found.sites, found.order);
      now.columns = found.methods;
      now.cells = new Map(found.sites.map((one, row) => [one.path, new Map(found.methods.map((name, column) => [name, found.choices[row][column]]))]));
      table.build(now.sites, now.columns, now.cells);
      tell(byId("choose-error"), null);
      draw();
    } catch (error) {
      if (mine !== asked || signal.aborted) return;
      if (error.problem?.error === "MethodError") tell(byId("choose-error"), error);
      else inputs.fail(error);
    } finally {
      if (mine === asked) {
        byId("sites-scroll").setAttribute("aria-busy", "false");
        table.wait(false);
      }
    }
  }

  /** Have the service try the plan: its notes, and the plan that a conversion takes. */
  async function tryPlan() {
    const { signal, model, choice } = now;
    if (signal.aborted) return;
    const { input_shape, dataset } = inputs.asked();
    const notes = byId("plan-notes");
    try {
      const found = await post("/v1/plans", { model: model.id, to: to(choice), input_shape, dataset }, { signal });
      if (now.choice !== choice) return;
      now.plan = found.plan;
      const said = new Map();
      for (const row of found.rows) for (const note of row.notes) said.set(note, [...(said.get(note) ?? []), row.site]);
      const lines = [...said].map(([note, paths]) => h("li", {}, placesOf(paths), ": ", shown(note)));
      notes.replaceChildren(...found.notes.map((note) => h("li", {}, shown(note))), ...lines);
      tell(byId("choose-error"), found.refused ? refusal(found) : null);
    } catch (error) {
      if (signal.aborted || now.choice !== choice) return;
      now.plan = null;
      notes.replaceChildren();
      tell(byId("choose-error"), error);
    }
  }

  addEventListener("resize", settled(200, () => now.model && !byId("view-model").hidden && draw()));

  return async (identifier, signal) => {
    const model = await get(`/v1/models/${identifier}`, { signal });
    const [sites, methods, data] = await Promise.all([
      all(`/v1/models/${identifier}/sites`, { signal }),
      get("/v1/methods", { signal }),
      all("/v1/datasets", { most: 200, signal }),
    ]);
    const kept = remembered(identifier);
    Object.assign(now, {
      model, sites, methods, signal, ordered: sites, columns: [], cells: new Map(), plan: null, choice: kept.choice ?? empty(),
    });
    header(model);
    fieldOfAll.fill(methods, true);
    fieldOfRule.fill(methods, true);
    fieldOfRule.set("");
    byId("patterns").replaceChildren(...groups(sites).slice(0, 200).map((pattern) => h("option", { value: pattern })));
    inputs.start(model, data, kept);
    tell(byId("choose-error"), null);
    byId("plan-notes").replaceChildren();
    table.build(sites, [], new Map());
    run.start(model);
    draw();
    if (!model.converted) survey();
    watchJobs({ rows: byId("model-jobs"), empty: byId("model-jobs-empty"), frame: byId("model-jobs-scroll") }, (job) => job.model === identifier, signal);
    return shown(model.filename);
  };
}

const site = (path) => now.sites.find((one) => one.path === path);
const cellsOf = (path) => now.cells.get(path);

/** Return the sites in the order in which data reach them, where a forward pass showed it. */
function inOrder(sites, order) {
  if (!order) return sites;
  const place = new Map(order.map((path, number) => [path, number]));
  return sites.toSorted((a, b) => (place.get(a.path) ?? sites.length) - (place.get(b.path) ?? sites.length));
}

/** Return what stands in the way of a plan, as a conversion would be refused. */
function refusal({ refused, rows }) {
  const refusals = rows.filter((row) => row.method === null).flatMap((row) => row.refusals.map((one) => ({ site: row.site, ...one })));
  return { problem: { title: refused === 1 ? "One site refuses this" : `${refused} sites refuse this`, refusals } };
}

function ruleLine(parts, label, remove) {
  return h("li", {}, h("span", {}, ...parts), h("button", { type: "button", class: "close", "aria-label": label, click: remove }, "×"));
}

const MOST_PLACES = 3;

function placesOf(paths) {
  const first = paths.slice(0, MOST_PLACES).map(shown).join(", ");
  return h("code", {}, paths.length > MOST_PLACES ? `${first} and ${paths.length - MOST_PLACES} more` : first);
}

function header(model) {
  byId("h-model").replaceChildren(h("bdi", {}, shown(model.filename)));
  const options = Object.entries(model.arguments).map(([name, value]) => `${name}=${value}`).join(" ");
  const facts = [
    ...(model.architecture ? [["Architecture", shown(model.architecture + (options ? ` (${options})` : ""))]] : []),
    ["Sites", count(model.sites)],
    ["Parameters", count(model.parameters)],
    ["Format", shown((model.architecture ? model.format : kind(model)) + (model.entry ? `, entry ${model.entry}` : ""))],
  ];
  byId("model-facts").replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  byId("model-notes").replaceChildren(...model.notes.map((note) => h("li", {}, shown(note))));
  show(byId("model-notes-part"), model.notes.length > 0);
  show(byId("model-converted"), model.converted);
}

function summarize() {
  const tally = new Map();
  let [refused, approx, unknown, changed] = [0, 0, 0, 0];
  for (const one of decisions.values()) {
    if (one.effect === "kept") continue;
    changed += 1;
    if (one.effect === "refused") refused += 1;
    if (one.effect === "approx") approx += 1;
    if (one.effect === "unknown") unknown += 1;
    if (one.effect !== "refused") tally.set(one.method, (tally.get(one.method) ?? 0) + 1);
  }
  const parts = [...tally].sort((a, b) => b[1] - a[1]).slice(0, 4).map(([method, many]) => `${shown(method)} × ${many}`);
  let verdict = "";
  if (!changed) verdict = "Every site keeps its BatchNorm";
  else if (refused) verdict = `${refused} refused`;
  else if (unknown) verdict = "asking the service";
  else verdict = approx ? `${approx} approximate` : "function kept exactly";
  byId("summary").replaceChildren(h("b", {}, parts.join(", ")), parts.length ? " · " : "", h("span", { class: refused ? "bad" : "" }, verdict));
  byId("convert-now").disabled = !changed || refused > 0 || now.model.converted;
}
