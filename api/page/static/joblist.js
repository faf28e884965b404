// Lists of jobs, looked at again while some are not finished.

import { get } from "./api.js";
import { duration, h, percent, show, shown, when } from "./dom.js";

export const UNFINISHED = ["queued", "running"];
export const KINDS = {
  convert: "Conversion", conversion: "Conversion", calibration: "Calibration", sensitivity: "Sensitivity", search: "Search",
};
const PACE = 2500;
/** So many lists of 50 are looked through for the jobs of one model. */
const MOST_PAGES = 10;

export function stateMark(state) {
  return h("span", { class: `state ${state}` }, state);
}

export function took(job) {
  if (!job.started || !job.finished) return "";
  return duration((new Date(job.finished) - new Date(job.started)) / 1000);
}

function progressOf(job) {
  const step = job.progress;
  if (job.state !== "running" || !step) return null;
  const far = step.total > 0 ? ` ${percent(step.done / step.total).replace(/\.\d/, "")}` : "";
  return h("small", {}, `${shown(step.stage)}${far}`);
}

function jobRow(job, withModel) {
  return h("tr", {},
    h("th", { scope: "row" }, h("a", { href: `#/jobs/${job.id}` }, KINDS[job.kind] ?? job.kind)),
    h("td", {}, stateMark(job.state), progressOf(job)),
    withModel ? h("td", {}, job.model ? h("a", { href: `#/models/${job.model}` }, h("bdi", {}, shown(job.name))) : h("bdi", {}, shown(job.name))) : null,
    h("td", {}, when(job.started ?? job.created)),
    h("td", { class: "n" }, took(job)));
}

/**
 * Show the jobs that `wanted` takes, and keep them up to date until `signal`.
 * @param parts {rows, empty, frame, part, more, withModel}
 */
export function watchJobs(parts, wanted, signal) {
  let most = 20;
  let timer = 0;
  const look = async () => {
    try {
      let cursor = null;
      const found = [];
      let pages = 0;
      do {
        const where = new URLSearchParams({ limit: 50, ...(cursor ? { cursor } : {}) });
        const page = await get(`/v1/jobs?${where}`, { signal });
        found.push(...page.items.filter(wanted));
        cursor = page.next;
        pages += 1;
      } while (cursor && found.length <= most && pages < MOST_PAGES);
      draw(parts, found.slice(0, most));
      if (parts.more) show(parts.more, found.length > most || Boolean(cursor));
      if (found.some((job) => UNFINISHED.includes(job.state))) again();
    } catch (error) {
      if (!signal.aborted && error.status !== 401) again();
    }
  };
  const again = () => {
    if (signal.aborted) return;
    timer = setTimeout(() => (document.hidden ? again() : look()), PACE);
  };
  signal.addEventListener("abort", () => clearTimeout(timer), { once: true });
  if (parts.more) {
    parts.more.onclick = () => {
      most += 50;
      look();
    };
  }
  look();
}

function draw(parts, jobs) {
  // A link that has the focus keeps it.
  const focused = parts.rows.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  parts.rows.replaceChildren(...jobs.map((job) => jobRow(job, parts.withModel)));
  if (focused) [...parts.rows.querySelectorAll("a")].find((link) => link.getAttribute("href") === focused)?.focus();
  show(parts.empty, !jobs.length);
  show(parts.frame, jobs.length > 0);
  parts.part?.setAttribute("aria-busy", "false");
}
