// Which view is shown: the address names it, so that a reload or another tab comes to the same place.

import { key, onChange, setKey, get, Problem } from "./api.js";
import { announce, byId, show, tell } from "./dom.js";
import { jobView } from "./job.js";
import { modelView } from "./model.js";
import { startView } from "./start.js";

const needsKey = document.body.dataset.needsKey === "yes";
const VIEWS = ["key", "start", "model", "job", "missing"];
const MAKERS = { start: startView(), model: modelView(), job: jobView() };
const ADDRESS = /^#\/(models|jobs)\/([A-Za-z0-9_]{1,40})$/;
let leaving = new AbortController();
let isFirst = true;

function put(name, title) {
  for (const one of VIEWS) show(byId(`view-${one}`), one === name);
  document.title = title ? `${title} – normsearch` : "normsearch";
  show(byId("forget-key"), Boolean(key()));
  if (!isFirst) {
    byId(`h-${name}`).focus({ preventScroll: true });
    scrollTo(0, 0);
    announce(byId(`h-${name}`).textContent);
  }
  isFirst = false;
}

async function route() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  if (needsKey && !key()) {
    put("key");
    byId("key").focus();
    return;
  }
  const [, nouns, identifier] = ADDRESS.exec(location.hash) ?? [];
  const name = { models: "model", jobs: "job" }[nouns] ?? "start";
  try {
    const title = await MAKERS[name](identifier, signal);
    if (!signal.aborted) put(name, title);
  } catch (error) {
    if (signal.aborted || error.status === 401) return;
    tell(byId("missing-text"), error instanceof Error ? error : new Error(String(error)));
    put("missing", "Not shown");
    if (!(error instanceof Problem)) setTimeout(() => !signal.aborted && route(), 3000);
  }
}

onChange((what) => {
  if (what === "key") {
    const had = Boolean(key());
    setKey(null);
    if (!needsKey) return;
    leaving.abort();
    put("key");
    if (had) tell(byId("key-error"), new Error("This key is not valid, or was revoked. Give another one."));
    byId("key").focus();
  }
  show(byId("offline"), what === "unreachable");
});

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = byId("key");
  const given = field.value.trim();
  tell(byId("key-error"), given ? null : new Error("Give the key that the operator made for you."));
  field.setAttribute("aria-invalid", String(!given));
  if (!given) return field.focus();
  if (!/^[\x21-\x7e]+$/.test(given)) {
    return tell(byId("key-error"), new Error("A key has letters and digits alone; this has others. Copy it again."));
  }
  setKey(given);
  try {
    await get("/v1/jobs?limit=1");
    field.value = "";
    field.removeAttribute("aria-invalid");
    route();
  } catch (error) {
    field.setAttribute("aria-invalid", "true");
    if (error.status !== 401) {
      setKey(null);
      tell(byId("key-error"), error);
    }
  }
});
byId("forget-key").addEventListener("click", () => {
  setKey(null);
  location.hash = "#/";
  route();
});
byId("missing-again").addEventListener("click", route);
addEventListener("hashchange", route);
route();
