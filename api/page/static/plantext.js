// A plan as text: what does the same from Python, the command line, or curl.

import { byId, copying, tabs } from "./dom.js";
import { KEEP } from "./choice.js";
import { suffix } from "./formats.js";

export const python = (value) => JSON.stringify(value)
  .replace(/[\u007f-\uffff]/g, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** Return a word of a shell. */
export const quoted = (text) => (/^[A-Za-z0-9_.,:/=@%+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

function pythonMapping(to) {
  if (typeof to === "string") return python(to);
  if (Array.isArray(to)) return `[${to.map(python).join(", ")}]`;
  const lines = Object.entries(to).map(([pattern, method]) => `    ${python(pattern)}: ${pythonMapping(method)},`);
  return `{\n${lines.join("\n")}\n}`;
}

function registered(model) {
  return !model.architecture.startsWith("factories/");
}

function argumentsOf(model) {
  const given = Object.entries(model.arguments);
  const values = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : python(value));
  return given.length ? `, {${given.map(([name, value]) => `${python(name)}: ${values(value)}`).join(", ")}}` : "";
}

export function asPython(model, to, { shape }) {
  if (!model.architecture) return ofFile(model, to, shape);
  const name = registered(model) ? `${python(model.architecture)}${argumentsOf(model)}` : '"yourpackage.networks:Net"';
  // Some methods are refused for what the shapes are.
  const inputs = shape ? `, inputs=torch.randn(2, ${shape.split("x").join(", ")})` : "";
  return [
    "import normsearch",
    ...(inputs ? ["import torch"] : []),
    "",
    ...(registered(model) ? [] : ["# whatever builds the network, as package.module:factory"]),
    `architecture = normsearch.Architecture(${name})`,
    `loaded = normsearch.load(${python(model.filename)}, architecture${registered(model) ? "" : ", allow_factories=True"})`,
    `plan = normsearch.plan(loaded.model, ${pythonMapping(to)}${inputs})`,
    "converted = normsearch.convert(loaded.model, plan)",
    'normsearch.save(converted, "converted.safetensors", architecture=architecture, plan=plan)',
  ].join("\n");
}

/** Return Python for a file that says itself what its network is. */
function ofFile(model, to, shape) {
  const isOnnx = suffix(model) === ".onnx";
  const library = isOnnx ? "onnx_graph" : "normsearch";
  // A file knows its own shapes, unless it leaves them open.
  const inputs = shape ? `, inputs=torch.randn(${[model.inputs?.[0]?.shape?.[0] ?? 2, ...shape.split("x")].join(", ")})` : "";
  return [
    isOnnx ? "from normsearch import onnx_graph" : "import normsearch",
    ...(inputs ? ["import torch"] : []),
    "",
    isOnnx ? `network = onnx_graph.load(${python(model.filename)})` : `network = normsearch.load(${python(model.filename)}).model`,
    `plan = ${library}.plan(network, ${pythonMapping(to)}${inputs})`,
    `converted = ${library}.convert(network, plan)`,
    `${library}.save(converted, "converted${suffix(model)}")`,
  ].join("\n");
}

/** Return the words after --to: patterns with their methods, or methods in order of preference. */
function words(to) {
  if (typeof to === "string") return [to];
  if (Array.isArray(to)) return [to.join(",")];
  return Object.entries(to).map(([pattern, method]) => `${pattern}=${[method].flat().join(",")}`);
}

export function asCommand(model, to, { shape }) {
  const parts = [`normsearch convert ${quoted(model.filename)}`];
  if (model.architecture) parts.push(`--architecture ${quoted(registered(model) ? model.architecture : "yourpackage.networks:Net")}`);
  for (const [name, value] of Object.entries(model.arguments)) parts.push(`--arguments ${quoted(`${name}=${value}`)}`);
  if (model.entry) parts.push(`--entry ${quoted(model.entry)}`);
  for (const word of words(to)) parts.push(`--to ${quoted(word)}`);
  if (shape) parts.push(`--input-shape ${shape} --report report.json`);
  // The command line's own batch size may not be the file's.
  const only = model.inputs?.[0]?.shape?.[0];
  if (shape && only) parts.push(`--batch-size ${only}`);
  parts.push(`-o converted${suffix(model)}`);
  return parts.join(" \\\n    ");
}

export function asCurl(model, to, { input_shape, dataset }, needsKey) {
  const body = JSON.stringify({ model: model.id, to, ...(input_shape ? { input_shape } : {}), ...(dataset ? { dataset } : {}) });
  return [
    `curl ${quoted(`${location.origin}/v1/conversions`)}`,
    ...(needsKey ? ['-H "Authorization: Bearer $KEY"'] : []),
    "-H 'Content-Type: application/json'",
    `-d ${quoted(body)}`,
  ].join(" \\\n    ");
}

export function planText() {
  const needsKey = document.body.dataset.needsKey === "yes";
  let given = null;
  let kind = "python";
  const draw = () => {
    if (!given) return;
    const [model, to, inputs] = given;
    const nothing = to === KEEP;
    byId("plan-code").textContent = nothing ? "# Choose a method: so far every site keeps its BatchNorm."
      : { python: asPython, cli: asCommand, curl: asCurl }[kind](model, to, inputs, needsKey);
  };
  tabs(byId("text-tabs"), (selected) => {
    kind = selected;
    draw();
  });
  copying(byId("copy-plan"), () => byId("plan-code").textContent);
  return {
    draw(...all) {
      given = all;
      draw();
    },
  };
}
