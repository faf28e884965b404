// The service's API, as this page uses it: nothing here that other clients could not do.

const KEY = "normsearch.key";
const listeners = new Set();

/** A problem that the service answered with (RFC 9457). */
export class Problem extends Error {
  constructor(status, problem) {
    super(problem?.detail ?? `the service answered ${status}`);
    this.status = status;
    this.problem = problem;
  }
}

/** There was no answer. */
export class Unreachable extends Error {
  constructor(what = "The service does not answer. It may be restarting: try again in a moment.") {
    super(what);
  }
}

export const key = () => sessionStorage.getItem(KEY);

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** Listen for: "key" (a key is needed), "reached", "unreachable". */
export function onChange(listener) {
  listeners.add(listener);
}

function changed(what) {
  for (const listener of listeners) listener(what);
}

function headers(more = {}) {
  return key() ? { ...more, Authorization: `Bearer ${key()}` } : more;
}

/** Return an Idempotency-Key: what is sent again with it is done once. */
export function onceKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((one) => one.toString(16).padStart(2, "0")).join("");
}

async function answered(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "omit", redirect: "error", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    changed("unreachable");
    throw new Unreachable();
  }
  changed("reached");
  if (response.ok) return response;
  throw refused(response.status, await response.text());
}

function refused(status, text) {
  let problem = null;
  try {
    problem = JSON.parse(text);
  } catch {
    // A proxy's answer, not the service's.
  }
  if (status === 401) changed("key");
  return new Problem(status, problem);
}

export async function get(path, { signal } = {}) {
  return (await answered(path, { headers: headers(), signal })).json();
}

export async function post(path, body, { signal, once } = {}) {
  const given = headers({ "Content-Type": "application/json", ...(once ? { "Idempotency-Key": once } : {}) });
  return (await answered(path, { method: "POST", headers: given, body: JSON.stringify(body), signal })).json();
}

/** Return all items of a list, page by page, at most `most`. */
export async function all(path, { most = Infinity, signal } = {}) {
  const items = [];
  let cursor = null;
  do {
    const where = new URLSearchParams({ limit: 200, ...(cursor ? { cursor } : {}) });
    const page = await get(`${path}?${where}`, { signal });
    items.push(...page.items);
    cursor = page.next;
  } while (cursor && items.length < most);
  return items;
}

/** Return the blob of a file that was made. */
export async function file(path) {
  return (await answered(path, { headers: headers() })).blob();
}

export async function text(path) {
  return (await answered(path, { headers: headers() })).text();
}

const BROKEN = "The connection broke while the file was sent. The service may be restarting, or refuses a file of this size: "
  + "try again, or delete what you no longer need.";

/**
 * Send a file; `onProgress` gets the bytes that were sent. `cancel` ends it.
 * fetch cannot tell how far a body was sent, so this is the older interface.
 */
export function upload(body, filename, onProgress) {
  const request = new XMLHttpRequest();
  const done = new Promise((resolve, reject) => {
    request.open("PUT", `/v1/uploads?${new URLSearchParams({ filename })}`);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => onProgress(event.loaded, event.total));
    request.addEventListener("load", () => {
      changed("reached");
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(refused(request.status, request.responseText));
    });
    request.addEventListener("error", () => reject(new Unreachable(BROKEN)));
    request.addEventListener("abort", () => reject(new DOMException("cancelled", "AbortError")));
    request.send(body);
  });
  return { done, cancel: () => request.abort() };
}

const pause = (milliseconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

/**
 * Follow the events of a job until it ends, through lost connections and restarts of the service.
 * EventSource can send no key, so the stream is read here.
 */
export async function follow(identifier, onEvent, signal) {
  let last = "";
  let wait = 500;
  while (!signal.aborted) {
    try {
      const more = last ? { "Last-Event-ID": last } : {};
      const response = await answered(`/v1/jobs/${identifier}/events`, {
        headers: headers({ Accept: "text/event-stream", ...more }), signal,
      });
      for await (const event of events(response.body)) {
        wait = 500;
        if (event.id) last = event.id;
        if (onEvent(event.name, JSON.parse(event.data), Number(event.id)) === "end") return;
      }
    } catch (error) {
      if (signal.aborted) return;
      const again = error instanceof Unreachable || error instanceof TypeError || [429, 502, 503, 504].includes(error.status);
      if (!again) throw error;
    }
    await pause(wait, signal);
    wait = Math.min(2 * wait, 8000);
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { id: "", name: "message", data: [] };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(":");
        if (colon < 1) continue;
        const value = line.slice(colon + 1).replace(/^ /, "");
        const field = line.slice(0, colon);
        if (field === "id") event.id = value;
        else if (field === "event") event.name = value;
        else if (field === "data") event.data.push(value);
      }
      if (event.data.length) yield { ...event, data: event.data.join("\n") };
    }
  }
}
