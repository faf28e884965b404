// What can be run on a model: a form for each kind of job.

import { onceKey, post } from "./api.js";
import { KEEP, to } from "./choice.js";
import { byId, h, show, tabs, tell } from "./dom.js";
import { jobsOf } from "./formats.js";

const KINDS = { conversions: "Convert", sensitivities: "Measure sensitivity", searches: "Search" };

export function runPart(state) {
  const [list, panel, bar] = [byId("run-tabs"), byId("run-panel"), byId("convert-now")];
  let kind = "conversions";
  let [once, sent] = ["", ""];
  const select = tabs(list, (selected) => {
    kind = selected;
    build();
  });
  list.replaceChildren(...Object.entries(KINDS).map(([name, title], number) =>
    h("button", { role: "tab", type: "button", id: `run-${name}`, "aria-controls": "run-panel", "aria-selected": String(!number), tabindex: number ? -1 : 0, "data-kind": name }, title)));
  /** Offer what can be run on a model, and say why the rest cannot. */
  const start = (model) => {
    const { kinds, why } = jobsOf(model);
    for (const name of Object.keys(KINDS)) show(byId(`run-${name}`), kinds.includes(name));
    byId("run-help").textContent = why;
    show(byId("run-help"), Boolean(why));
    if (kinds.includes(kind)) build();
    else select("conversions");
  };
  bar.addEventListener("click", () => {
    select("conversions");
    panel.querySelector("form").requestSubmit();
  });

  function build() {
    const made = FORMS[kind](state);
    const error = h("div", { class: "error", role: "alert", hidden: true });
    const button = h("button", { class: "primary" }, KINDS[kind]);
    const form = h("form", { novalidate: true }, ...made.parts, error, h("div", { class: "actions" }, button));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      button.disabled = bar.disabled = true;
      tell(error, null);
      try {
        const body = made.body(new FormData(form));
        // What was not answered may have been done: sent again with the same key, it is not done twice.
        if (JSON.stringify(body) !== sent) [sent, once] = [JSON.stringify(body), onceKey()];
        const job = await post(`/v1/${kind}`, body, { once });
        sent = "";
        location.hash = `#/jobs/${job.id}`;
      } catch (problem) {
        if (problem.status) sent = "";
        tell(error, problem);
        error.scrollIntoView({ block: "nearest" });
      } finally {
        button.disabled = bar.disabled = false;
        made.draw?.(button);
      }
    });
    panel.replaceChildren(form);
    made.draw?.(button);
    draw = () => made.draw?.(button);
  }
  let draw = () => {};
  return { start, draw: () => draw() };
}

export const field = (label, input, help) => {
  const id = `run-${input.name}`;
  input.id = id;
  if (help) input.setAttribute("aria-describedby", `${id}-help`);
  return h("div", { class: "field" }, h("label", { for: id }, label), input, help ? h("p", { class: "help", id: `${id}-help` }, help) : null);
};

export const number = (name, value, least, most) => h("input", { name, type: "number", value, min: least, max: most, inputmode: "numeric" });

export function whole(form, name) {
  const value = Number(form.get(name));
  if (!Number.isInteger(value)) throw new Error(`${name.replace("_", " ")}: give a whole number`);
  return value;
}

const inputsOf = ({ input_shape, dataset }) => ({ input_shape, dataset });

/** What is chosen from where nothing is said, as in the library. */
const SEARCHED = ["batch", "group", "layer", "instance", "batch_instance", "switchable", "batch_renorm"];

const FORMS = {
  conversions: (state) => {
    const said = h("p", {});
    const keep = h("select", { name: "keep" },
      h("option", { value: "function" }, "the function: statistics are folded in"),
      h("option", { value: "affine" }, "γ and β alone"),
      h("option", { value: "nothing" }, "nothing: a fresh layer"));
    return {
      parts: [said, h("div", { class: "fields" }, field("New layers keep", keep))],
      draw(button) {
        const now = state();
        const nothing = now.model && to(now.choice) === KEEP;
        button.disabled = nothing;
        said.textContent = nothing ? "Choose a method first: so far every site keeps its BatchNorm."
          : now.dataset ? "The report measures outputs, drift and cost on the data set."
            : now.input_shape ? "The report measures on random numbers; give a data set for drifts on real inputs."
              : "Without inputs the report measures nothing; shapes are not checked.";
      },
      body(form) {
        const now = state();
        const keep = form.get("keep");
        return { model: now.model.id, to: to(now.choice), keep, ...inputsOf(now) };
      },
    };
  },
  sensitivities: (state) => {
    const which = h("select", { name: "which" }, h("option", { value: "all" }, "every method"), h("option", { value: "chosen" }, "the methods that are chosen above"));
    return {
      parts: [
        h("p", {}, "Changes one site at a time and measures how far the output moves: which layers can be changed, and to what?"),
        h("div", { class: "fields" }, field("Methods", which), field("Veto above", h("input", { name: "threshold", type: "number", value: "0.2", min: "0.001", step: "any" }), "relative L2 of the output"), field("Samples", number("samples", 64, 1, 1_000_000))),
      ],
      body(form) {
        const now = state();
        const methods = form.get("which") === "chosen" ? [...new Set(now.decided.filter((method) => method !== KEEP))] : null;
        return { model: now.model.id, methods, threshold: Number(form.get("threshold")), samples: whole(form, "samples"), ...inputsOf(now) };
      },
    };
  },
  searches: (state) => {
    const needs = h("p", { class: "warn" }, "A search trains and scores plans on a data set with labels: choose one under Inputs.");
    const offered = state().methods.map((one) =>
      h("label", { class: "check" }, h("input", { type: "checkbox", name: "methods", value: one.name, checked: SEARCHED.includes(one.name) }), one.name));
    return {
      parts: [
        h("p", {}, "Tries plans that mix methods, trains each for a moment, and returns the best; a mix only if it beats the best uniform plan on data that no trial saw."),
        needs,
        h("fieldset", { class: "choices" }, h("legend", {}, "Methods to choose from"), ...offered),
        h("div", { class: "fields" },
          field("Plans to try", number("trials", 24, 2, 5000)), field("Training steps of each", number("steps", 100, 1, 20_000)),
          field("Samples", number("samples", 10_000, 10, 1_000_000), "60 % train, 20 % score, 20 % confirm"),
          field("Fresh seeds for the best", number("confirm", 3, 0, 20), "0 takes the best at its word")),
        h("div", { class: "actions" },
          h("label", { class: "check" }, h("input", { type: "checkbox", name: "batch_independent" }), "no output may depend on the batch"),
          h("label", { class: "check" }, h("input", { type: "checkbox", name: "latency" }), "minimise latency as well (Pareto front)")),
      ],
      draw(button) {
        const { dataset, data } = state();
        const found = data.find((one) => one.id === dataset);
        const fits = Boolean(found && (found.targets || found.kind === "images"));
        needs.hidden = fits;
        button.disabled = !fits;
      },
      body(form) {
        const now = state();
        const methods = form.getAll("methods");
        if (methods.length < 2) throw new Error("Choose at least two methods to search among.");
        return {
          model: now.model.id, dataset: now.dataset, methods, trials: whole(form, "trials"), samples: whole(form, "samples"),
          confirm: whole(form, "confirm"), recipe: { steps: whole(form, "steps") },
          constraints: { batch_independent: form.has("batch_independent") }, costs: form.has("latency") ? ["latency"] : [],
        };
      },
    };
  },
};

