// The inputs of forward passes: none, random numbers of a shape, or a data set.

import { onceKey, post, upload } from "./api.js";
import { announce, byId, count, h, show, shown, tell } from "./dom.js";
import { sampleShape } from "./formats.js";
import { remember } from "./session.js";

const SHAPE = /^[1-9][0-9]{0,6}(x[1-9][0-9]{0,6}){0,4}$/;
const DEFAULT = { torchvision: "3x224x224", timm: "3x224x224", smp: "3x256x256" };

export function inputsPart(onChange) {
  const [select, shape, error] = [byId("inputs"), byId("shape"), byId("inputs-error")];
  let model = null;
  let data = [];
  let busy = false;

  const isShape = () => select.value === "random";
  const changed = () => {
    show(byId("shape-field"), isShape());
    const bad = isShape() && !SHAPE.test(shape.value);
    shape.setAttribute("aria-invalid", String(bad));
    tell(error, bad ? new Error("Write the shape of one sample, channels first, for example 3x224x224.") : null);
    remember(model.id, { inputs: select.value, shape: shape.value });
    if (!bad) onChange();
  };
  select.addEventListener("change", changed);
  shape.addEventListener("change", changed);

  byId("data-file").addEventListener("change", async (event) => {
    const file = event.target.files[0];
    if (!file || busy) return;
    const bar = byId("data-bar");
    busy = true;
    tell(error, null);
    show(bar);
    try {
      bar.value = 0;
      const sent = await upload(file, file.name, (done, total) => (bar.value = total ? done / total : 1)).done;
      bar.removeAttribute("value");
      const made = await described(sent.id);
      data.unshift(made);
      fill(made.id);
      announce(`${made.filename} added`);
      changed();
    } catch (problem) {
      tell(error, problem);
    } finally {
      busy = false;
      show(bar, false);
      event.target.value = "";
    }
  });

  function fill(value) {
    const labels = data.map((one) => h("option", { value: one.id }, named(one)));
    select.replaceChildren(
      h("option", { value: "none" }, "nothing: shapes stay unknown"),
      h("option", { value: "random" }, "random numbers"),
      ...labels);
    select.value = [...select.options].some((option) => option.value === value) ? value : "none";
  }

  return {
    start(shownModel, known, kept) {
      model = shownModel;
      data = known;
      const usual = model.architecture ? DEFAULT[model.architecture.split("/")[0]] : sampleShape(model);
      fill(kept.inputs ?? (usual && !model.converted ? "random" : "none"));
      shape.value = kept.shape ?? usual ?? "";
      show(byId("shape-field"), isShape());
      tell(error, null);
    },
    /** Return the inputs as a request has them. */
    asked() {
      if (isShape()) return { input_shape: SHAPE.test(shape.value) ? shape.value : undefined, dataset: undefined };
      return { input_shape: undefined, dataset: select.value === "none" ? undefined : select.value };
    },
    /** Return the shape of one sample, as far as it is known: what tells the same elsewhere. */
    shape() {
      if (isShape()) return SHAPE.test(shape.value) ? shape.value : undefined;
      return shapeIn(data.find((one) => one.id === select.value));
    },
    data: () => data,
    fail: (problem) => tell(error, problem),
  };
}

function shapeIn(found) {
  if (found?.kind === "images") return `${found.preparation.mean.length}x${found.preparation.size}x${found.preparation.size}`;
  const [only, ...more] = (found?.arrays ?? []).filter((array) => array.name !== found.targets);
  return only && !more.length && only.shape.length > 1 ? only.shape.slice(1).join("x") : undefined;
}

/** Read an upload as inputs; of two arrays the second holds labels if it can. */
async function described(id) {
  const made = await post("/v1/datasets", { upload: id }, { once: onceKey() });
  const [first, second, ...more] = made.arrays;
  const isLabelled = second && !more.length && second.shape.length === 1 && second.dtype.startsWith("int") && first.shape[0] === second.shape[0];
  return isLabelled ? post("/v1/datasets", { upload: id, targets: second.name }, { once: onceKey() }) : made;
}

function named(one) {
  const size = one.samples === null ? "" : `, ${count(one.samples)} samples`;
  const labels = one.targets || one.kind === "images" ? ", labelled" : "";
  return `${shown(one.filename)}${size}${labels}`;
}
