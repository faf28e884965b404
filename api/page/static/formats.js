// What the formats of networks differ in: what they are called, what loads them, what cannot be run on them.

/** Files that say themselves what their network is, by the end of their name. */
const COMPLETE = { pt2: "An exported program", onnx: "An ONNX file" };

/** Return what a file is that needs no architecture; undefined for any other. */
export const complete = (filename) => COMPLETE[filename.toLowerCase().split(".").at(-1)];

const isProgram = (model) => model.format === "exported program";
const isOnnx = (model) => model.format === "onnx";

/** Return the end of the name of what is made of a model. */
export const suffix = (model) => (isProgram(model) ? ".pt2" : isOnnx(model) ? ".onnx" : ".safetensors");

/** Return what a model is known as in lists: its architecture, or what kind of file it is. */
export const kind = (model) => model.architecture ?? (isOnnx(model) ? "ONNX file" : model.format);

/** Return the kinds of jobs that can be run on a model, and why not the others. */
export function jobsOf(model) {
  if (isOnnx(model)) {
    return { kinds: ["conversions", "sensitivities"], why: "A search trains, and an ONNX file is for inference: search on a checkpoint of the network, and export its result." };
  }
  if (isProgram(model)) {
    return { kinds: ["conversions", "sensitivities"], why: "A search trains, and an exported program stays in the mode that it was exported in. The plan of a search on its checkpoint fits the program too, since the sites have the same paths: give it to POST /v1/conversions." };
  }
  return { kinds: ["conversions", "sensitivities", "searches"], why: "" };
}

/** Return the shape of one sample where the file says it. */
export function sampleShape(model) {
  const [only, ...more] = model.inputs ?? [];
  const sizes = only?.shape?.slice(1) ?? [];
  return !more.length && sizes.length && sizes.every((size) => size > 0) ? sizes.join("x") : undefined;
}
