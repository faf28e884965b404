// What may follow a job: a conversion is calibrated.

import { all, onceKey, post } from "./api.js";
import { byId, count, h, show, shown, tell } from "./dom.js";
import { field, number, whole } from "./run.js";

export function nextPart() {
  return {
    async draw(job, artifacts, signal) {
      const weights = artifacts.find((one) => one.role === "weights");
      if (!weights || !["conversion", "convert"].includes(job.kind) || job.result.exact) return;
      const data = await all("/v1/datasets", { most: 200, signal });
      if (signal.aborted) return;
      byId("next").replaceChildren(form(job, weights, data));
      show(byId("next-part"));
    },
  };
}

function form(job, weights, data) {
  const trains = !weights.filename.endsWith(".onnx");
  const about = h("p", {}, trains
    ? "Calibration brings the function back with a few unlabelled inputs: whitening, least squares, then distillation."
    : "Calibration brings the function closer with a few unlabelled inputs: whitening and least squares, site after site.");
  if (!data.length) {
    return h("div", {}, about, h("p", {}, "It needs a data set: add one to ", h("a", { href: `#/models/${job.model}` }, "the model"), ", then come back."));
  }
  const which = h("select", { name: "dataset" }, ...data.map((one) => h("option", { value: one.id, selected: one.id === job.dataset }, `${shown(one.filename)}${one.samples ? `, ${count(one.samples)} samples` : ""}`)));
  const what = h("select", { name: "parameters" }, h("option", { value: "all" }, "all parameters"), h("option", { value: "affine" }, "the new layers alone"));
  const error = h("div", { class: "error", role: "alert", hidden: true });
  const button = h("button", { class: "primary" }, "Calibrate");
  const made = h("form", { novalidate: true }, about,
    h("div", { class: "fields" }, field("Inputs", which), field("Samples", number("samples", 256, 1, 1_000_000)),
      ...(trains ? [field("Optimisation steps", number("budget", 200, 0, 20_000), "at most"), field("May change", what)] : [])),
    error, h("div", { class: "actions" }, button));
  let [once, sent] = ["", ""];
  made.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    tell(error, null);
    try {
      const given = new FormData(made);
      const body = {
        weights: weights.id, dataset: given.get("dataset"), samples: whole(given, "samples"),
        ...(trains ? { parameters: given.get("parameters"), budget: whole(given, "budget") } : {}),
      };
      if (JSON.stringify(body) !== sent) [sent, once] = [JSON.stringify(body), onceKey()];
      const started = await post("/v1/calibrations", body, { once });
      location.hash = `#/jobs/${started.id}`;
    } catch (problem) {
      if (problem.status) sent = "";
      tell(error, problem);
    } finally {
      button.disabled = false;
    }
  });
  return made;
}
