// The first view: upload a checkpoint, or try the example; the lists of models and jobs.

import { get, onceKey, post, upload } from "./api.js";
import { combobox } from "./combobox.js";
import { announce, byId, bytes, count, duration, h, show, shown, tell, when } from "./dom.js";
import { complete, kind } from "./formats.js";
import { watchJobs } from "./joblist.js";
import { remember } from "./session.js";

const { base, uploadBytes, exampleWeights, exampleData } = document.body.dataset;
const EXAMPLE_ARCHITECTURE = "factories/digits";
const EXAMPLE_SHAPE = "1x8x8";

export function startView() {
  const form = uploading();
  combobox(byId("architecture"), byId("architectures"), searched, () => {});
  byId("try").addEventListener("click", tryExample);
  return async (_, signal) => {
    form.reset();
    fillModels(signal).catch(() => {});
    watchJobs({
      rows: byId("jobs"), empty: byId("jobs-empty"), frame: byId("jobs-scroll"), part: byId("jobs-part"),
      more: byId("more-jobs"), withModel: true,
    }, () => true, signal);
    return "";
  };
}

const MOST_NAMES = 60;

/** Return the names that hold a text: those that begin like it first, the shorter the better. */
async function searched(text) {
  const part = text.toLowerCase().replace(/[[\]?*]/g, "?");
  // The best-known library comes last in the list, which has an end.
  const asked = part ? [`torchvision/*${part}*`, `*${part}*`] : ["factories/*", "torchvision/*"];
  const pages = await Promise.all(asked.map((match) => get(`/v1/architectures?${new URLSearchParams({ match, limit: 200 })}`)));
  tellArguments(pages[0].arguments);
  const names = [...new Set(pages.flatMap((page) => page.items))];
  if (!part) return names;
  const rank = (name) => Number(!name.slice(name.indexOf("/") + 1).startsWith(text.toLowerCase()));
  const bare = (name) => name.length - name.indexOf("/");
  return names.sort((a, b) => rank(a) - rank(b) || bare(a) - bare(b) || b.localeCompare(a)).slice(0, MOST_NAMES);
}

function tellArguments(known) {
  const library = byId("architecture").value.split("/")[0];
  const names = Object.keys(known[library] ?? {});
  byId("arguments-known").textContent = names.length ? `${library} takes ${names.join(", ")}.` : "";
}

/** Return the arguments that a text names; what JSON reads is no text. */
export function argumentsOf(text) {
  const made = {};
  for (const pair of text.trim().split(/\s+/).filter(Boolean)) {
    const [name, value, ...more] = pair.split("=");
    if (!name || value === undefined || more.length || name in made) {
      throw new Error(`Arguments: write each as name=value, once; ${shown(pair)} is not`);
    }
    try {
      const read = JSON.parse(value);
      made[name] = ["boolean", "number", "string"].includes(typeof read) ? read : value;
    } catch {
      made[name] = value;
    }
  }
  return made;
}

/** The form for a checkpoint: what was sent is not sent again when only its architecture was wrong. */
function uploading() {
  const [file, drop, error] = [byId("file"), byId("drop"), byId("upload-error")];
  let chosen = null;
  let sent = null;
  let cancel = null;

  const choose = async (given) => {
    if (!given || cancel) return;
    chosen = given;
    sent = null;
    byId("file-name").textContent = shown(given.name);
    byId("file-note").textContent = `${bytes(given.size)}, choose or drop another one to replace it`;
    drop.classList.add("filled");
    announce(`${given.name}, ${bytes(given.size)}`);
    tell(error, given.size > Number(uploadBytes)
      ? new Error(`${shown(given.name)} has ${bytes(given.size)}; this service takes ${bytes(Number(uploadBytes))} at most`)
      : null);
    needs(given.name);
    if (!complete(given.name)) await guess(given.name);
  };
  file.addEventListener("change", () => choose(file.files[0]));
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    choose(event.dataTransfer.files[0]);
  });
  // A file that misses the field must not replace the page.
  for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault());

  const busy = (is) => {
    byId("upload-button").disabled = is;
    file.disabled = is;
    show(byId("upload-cancel"), is);
    show(byId("upload-progress"), is);
    if (!is) cancel = null;
  };
  byId("upload-cancel").addEventListener("click", () => cancel?.());
  byId("upload-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    tell(error, null);
    if (!chosen) {
      tell(error, new Error("Choose a file first."));
      return file.focus();
    }
    try {
      const asked = complete(chosen.name) ? {} : {
        architecture: byId("architecture").value.trim() || null,
        arguments: argumentsOf(byId("arguments").value),
        entry: byId("entry").value.trim() || null,
      };
      const stopped = new AbortController();
      if (!sent) {
        const sending = upload(chosen, chosen.name, progress());
        cancel = sending.cancel;
        busy(true);
        sent = await sending.done;
      }
      cancel = () => stopped.abort();
      busy(true);
      byId("upload-bar").removeAttribute("value");
      byId("upload-text").textContent = "Received. Reading it in a process of its own…";
      announce("Received. Reading it");
      const model = await post("/v1/models", { upload: sent.id, ...asked }, { signal: stopped.signal, once: onceKey() });
      location.hash = `#/models/${model.id}`;
    } catch (problem) {
      if (problem.name === "AbortError") announce("Cancelled");
      else tell(error, problem);
    } finally {
      busy(false);
    }
  });

  return {
    reset() {
      if (cancel) return;
      chosen = sent = null;
      byId("upload-form").reset();
      tell(error, null);
      drop.classList.remove("filled");
      byId("file-name").textContent = "Choose a file";
      byId("file-note").textContent = "or drop it here";
      needs("");
    },
  };
}

/** Ask for an architecture where a file needs one. */
function needs(filename) {
  const what = complete(filename);
  for (const part of ["architecture-part", "arguments-part"]) show(byId(part), !what);
  show(byId("complete"), Boolean(what));
  byId("complete").textContent = what ? `${what} says itself what its network is: it needs no architecture.` : "";
}

/** Fill in the architecture that a file is named after, such as resnet50-0676ba61.pth. */
async function guess(filename) {
  const field = byId("architecture");
  const name = filename.toLowerCase().split(/[-.]/)[0];
  if (field.value || !/^[a-z0-9_]+$/.test(name)) return;
  for (const library of ["torchvision", "timm"]) {
    try {
      const found = await get(`/v1/architectures?match=${library}/${name}&limit=1`);
      if (found.items.length && !field.value) field.value = found.items[0];
    } catch {
      // It was only a guess.
      return;
    }
  }
}

function progress() {
  const start = performance.now();
  const [bar, text] = [byId("upload-bar"), byId("upload-text")];
  bar.value = 0;
  text.textContent = "Sending…";
  return (done, total) => {
    const seconds = (performance.now() - start) / 1000;
    bar.value = total ? done / total : 1;
    const left = done && seconds > 1 ? `, ${duration((seconds * (total - done)) / done)} left` : "";
    text.textContent = `${bytes(done)} of ${bytes(total)}${left}`;
  };
}

async function tryExample() {
  const [button, error] = [byId("try"), byId("try-error")];
  tell(error, null);
  button.disabled = true;
  button.textContent = "Reading the digits network…";
  try {
    // The files go the way that anyone's go.
    const send = async (name) => {
      const response = await fetch(`${base}/${name}`);
      return (await upload(await response.blob(), name, () => {}).done).id;
    };
    const [weights, digits] = await Promise.all([send(exampleWeights), send(exampleData)]);
    const [model, data] = await Promise.all([
      post("/v1/models", { upload: weights, architecture: EXAMPLE_ARCHITECTURE }, { once: onceKey() }),
      post("/v1/datasets", { upload: digits, targets: "arr_1" }, { once: onceKey() }),
    ]);
    remember(model.id, { inputs: data.id, shape: EXAMPLE_SHAPE, choice: { all: "group", rules: [], sites: {} } });
    location.hash = `#/models/${model.id}`;
  } catch (problem) {
    tell(error, problem);
  } finally {
    button.disabled = false;
    button.textContent = "Try the digits network";
  }
}

async function fillModels(signal) {
  let cursor = null;
  const [rows, more] = [byId("models"), byId("more-models")];
  const part = byId("models-part");
  const next = async () => {
    const where = new URLSearchParams({ limit: 20, ...(cursor ? { cursor } : {}) });
    const page = await get(`/v1/models?${where}`, { signal });
    if (!cursor) rows.replaceChildren();
    cursor = page.next;
    rows.append(...page.items.map(row));
    show(more, Boolean(cursor));
    show(byId("models-empty"), !rows.children.length);
    show(byId("models-scroll"), rows.children.length > 0);
    part.setAttribute("aria-busy", "false");
  };
  more.onclick = next;
  await next();
}

function row(model) {
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: `#/models/${model.id}` }, h("bdi", {}, shown(model.filename)))),
    h("td", {}, shown(kind(model))),
    h("td", { class: "n" }, count(model.sites)),
    h("td", { class: "n" }, count(model.parameters)),
    h("td", {}, when(model.created)));
}
